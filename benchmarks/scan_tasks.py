"""How often the untrained model is right on reasoning-gym's tasks: where training has a signal to start from.

`python -m benchmarks.scan_tasks [task:{options} ...]` prints one JSON line a task: share right, sampled, of a strict
scorer.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

from actors.data.readers import DataError
from actors.rollout import RolloutWorker
from actors.types import Sampling
from benchmarks.common import build_workers, report, sample_groups
from conf.compose import load_settings
from conf.schema import Settings
from epiphany.report.evaluation import best_constant, summarize
from epiphany.reward_check import make_reward
from epiphany.rows import read_rows
from epiphany.run_data import load_data
from rewards.correctness import plain_number

# Tasks whose answers fit in few tokens, the smallest sizes that they offer.
CANDIDATES = """
products:{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
chain_sum:{min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}
chain_sum:{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}
basic_arithmetic:{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
gcd:{max_value: 30} lcm:{max_value: 12} count_bits:{max_n: 64} leg_counting:{max_animals: 2, max_instances: 3}
letter_counting:{min_words: 2, max_words: 4} number_filtering:{} number_sequence:{} simple_equations:{max_value: 10}
calendar_arithmetic:{} count_primes:{max_n: 30} fraction_simplification:{}
spell_backward:{min_word_len: 3, max_word_len: 4} word_sorting:{min_words: 2, max_words: 2} letter_jumble:{}
simple_integration:{} time_intervals:{} base_conversion:{} bitwise_arithmetic:{difficulty: 1} decimal_arithmetic:{}
family_relationships:{} propositional_logic:{} syllogism:{} coin_flip:{}
needle_haystack:{min_num_statements: 3, max_num_statements: 5} self_reference:{} gsm_symbolic:{}
largest_island:{} isomorphic_strings:{} palindrome_generation:{} group_anagrams:{} caesar_cipher:{} string_length:{}
"""


def candidates(arguments: list[str]) -> list[tuple[str, str]]:
    """(task, options in YAML) of each argument task:{options}, or of CANDIDATES."""
    return re.findall(r"(\w+):(\{[^}]*\})", " ".join(arguments) or CANDIDATES)


def settings_for(task: str, options: str, reward: str) -> Settings:
    task_options = "{" + ", ".join(filter(None, ["size: 200", options[1:-1]])) + "}"
    return load_settings(
        "experiment=sums",
        f"reward={reward}",
        f"data.source=reasoning_gym:{task}",
        f"data.task={task_options}",
        "data.max_prompt_tokens=384",
        "data.held_out=32",
    )


def main() -> None:
    workers = build_workers(settings_for("chain_sum", "{}", "numeric"))
    worker = RolloutWorker(workers.engine, seed=0)
    for task, options in candidates(sys.argv[1:]):
        try:
            rows = read_rows(settings_for(task, options, "gym"))
            data = load_data(settings_for(task, options, "gym"), rows)
        except DataError as error:
            print(json.dumps({"task": task, "options": options, "error": str(error)[:120]}), flush=True)
            continue
        answers_are_numbers = all(plain_number(row.answer or "") is not None for row in rows.train[0].rows)
        settings, prompts = settings_for(task, options, "numeric" if answers_are_numbers else "exact"), data.prompts
        groups = sample_groups(worker, prompts.held_out, Sampling(1.0, 32), 4)
        with tempfile.TemporaryDirectory() as scratch:
            reward = make_reward(settings, Path(scratch) / "rewards.log")
            scored = [reward.score(group, True) for group in groups]
            reward.close()
        summary, first = summarize(scored), scored[0]
        report(
            benchmark="scan_tasks",
            task=task,
            options=options,
            reward=settings.reward.terms[0].fn,
            right=summary.lenient,
            strict=summary.strict,
            best_constant=best_constant([prompt.answer for prompt in prompts.held_out]),
            truncated=summary.truncated,
            example=[first.prompt.question[-80:], first.prompt.answer, first.trajectories[0].text[:80]],
        )


if __name__ == "__main__":
    main()
