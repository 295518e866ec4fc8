"""How often the untrained model is right on reasoning-gym's tasks: where training has a signal to start from.

python -m benchmarks.scan_tasks [task ...] prints one JSON line a task: share right, sampled, of a strict scorer.
"""

import json
import re
import sys

from actors.build import (
    build_prompts,
    build_rows,
)
from actors.rollout import RolloutWorker
from actors.sources import DataError
from actors.types import Sampling
from benchmarks.common import build_workers, sample_groups, settings_from
from conf.schema import Settings
from report.evaluation import accuracy, best_constant
from rewards.answers import plain_number
from workers import make_reward

# Tasks whose answers fit in few tokens, the smallest sizes that they offer.
CANDIDATES = """
products:{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
chain_sum:{min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}
chain_sum:{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2}
basic_arithmetic:{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}
gcd:{max_value: 30} lcm:{max_value: 12} count_bits:{max_n: 64} leg_counting:{max_animals: 2, max_instances: 3}
letter_counting:{min_words: 2, max_words: 4} number_filtering:{} number_sequence:{} simple_equations:{max_value: 10}
calendar_arithmetic:{} count_primes:{max_n: 30} fraction_simplification:{} spell_backward:{min_word_len: 3, max_word_len: 4}
word_sorting:{min_words: 2, max_words: 2} letter_jumble:{} simple_integration:{} time_intervals:{} base_conversion:{}
bitwise_arithmetic:{difficulty: 1} decimal_arithmetic:{} family_relationships:{} propositional_logic:{} syllogism:{}
coin_flip:{} needle_haystack:{min_num_statements: 3, max_num_statements: 5} self_reference:{} gsm_symbolic:{}
largest_island:{} isomorphic_strings:{} palindrome_generation:{} group_anagrams:{} caesar_cipher:{} string_length:{}
"""


def candidates(arguments: list[str]) -> list[tuple[str, str]]:
    """(task, options in YAML) of each argument task:{options}, or of CANDIDATES."""
    found = re.findall(r"(\w+):(\{[^}]*\})", " ".join(arguments) or CANDIDATES)
    return [(task, options) for task, options in found]


def settings_for(task: str, options: str, reward: str) -> Settings:
    task_options = "{" + ", ".join(filter(None, ["size: 200", options[1:-1]])) + "}"
    overrides = [
        "experiment=sums", f"reward={reward}", f"data.source=reasoning_gym:{task}", "data=file", f"++data.task={task_options}",
        "data.max_prompt_tokens=384", "data.held_out=32",
    ]  # fmt: skip
    return settings_from(*overrides)


def main() -> None:
    first = settings_for("chain_sum", "{}", "numeric")
    workers = build_workers(first)
    tokenizer = workers.tokenizer
    worker = RolloutWorker(workers.engine, seed=0)
    for task, options in candidates(sys.argv[1:]):
        try:
            rows, _ = build_rows(settings_for(task, options, "gym"))
            numbers = all(plain_number(row.answer or "") is not None for row in rows.rows)
            settings = settings_for(task, options, "numeric" if numbers else "exact")
            prompts = build_prompts(settings, rows, None, tokenizer).held_out
        except DataError as error:
            print(json.dumps({"task": task, "options": options, "error": str(error)[:120]}), flush=True)
            continue
        reward = make_reward(settings)
        groups = [reward.score(g, True) for g in sample_groups(worker, prompts, Sampling(1.0, 32), 4)]
        result = accuracy(groups)
        row = {
            "task": task, "options": options, "reward": settings.reward.terms[0].fn, "right": result.lenient,
            "strict": result.strict, "best_constant": best_constant([p.answer for p in prompts]), "cut": result.truncated,
            "example": [prompts[0].question[-80:], prompts[0].answer, groups[0].completions[0].text[:80]],
        }  # fmt: skip
        print(json.dumps(row), flush=True)
        reward.close()


if __name__ == "__main__":
    main()
