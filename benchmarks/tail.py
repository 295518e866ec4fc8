"""Real answers of unlike lengths: `python -m benchmarks.tail MODEL QUESTIONS [--batches 4] [override ...]`.

Samples batches of a GSM8K run (conf/experiment/gsm8k.yaml) with the engine alone. MODEL is as model.path takes it,
QUESTIONS as data.source does. JSON lines: `tail`, each batch by itself, as a strictly on-policy run samples it (how
long few sequences run at the end, and what a step takes then); `tail-refilled`, all batches at the same time, so that
the next sequence takes the place of a finished one. The first batch only warms up. `--steps FILE` writes every step's
time and number of sequences as JSON.
"""

import argparse
import gc
import itertools
import json
import statistics
from pathlib import Path

from actors.data.prompts import PromptSet
from actors.types import Completion, Sampling
from benchmarks.common import build_engine, new_requests, random_adapter, report
from benchmarks.engine_steps import EngineSteps, timed_steps
from conf.compose import load_settings
from epiphany.rows import read_rows
from epiphany.run_data import load_data

FEW = (4, 8, 16, 32, 64)


def summary(steps: EngineSteps[Completion], *, most: int) -> dict[str, object]:
    """What a run of at most `most` sequences at a time was like."""
    pairs = list(zip(steps.running, steps.seconds, strict=True))
    lengths = sorted(len(completion.token_ids) for completion in steps.finished)
    wall, tokens = steps.wall_seconds, sum(lengths)
    return {
        "sequences": len(lengths),
        "wall_seconds": wall,
        "steps": len(pairs),
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "length_mean": statistics.mean(lengths),
        "length_median": statistics.median(lengths),
        "length_p90": lengths[int(0.9 * len(lengths))],
        "length_most": lengths[-1],
        "truncated_share": sum(completion.finish_reason == "length" for completion in steps.finished) / len(lengths),
        "wall_share_under": {n: round(sum(s for running, s in pairs if running < n) / wall, 4) for n in FEW},
        "token_share_under": {
            n: round(sum(running for running in steps.running if running < n) / sum(steps.running), 4) for n in FEW
        },
        "first_half_of_sequences_done_at": round(
            sum(s for running, s in pairs if running > len(lengths) // 2) / wall, 4
        ),
        "step_ms_by_running": {
            f"{low + 1}-{high}": round(1e3 * statistics.median(times), 3)
            for low, high in itertools.pairwise([0, *FEW, most])
            if (times := [s for running, s in pairs if low < running <= high])
        },
    }


def batch_prompts(prompts: PromptSet, batch: int, *, size: int, group: int) -> list[tuple[int, ...]]:
    """The token ids of each sequence of a batch."""
    return [prompts.at(batch * size + i).token_ids for i in range(size) for _ in range(group)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=Path)
    arguments, overrides = parser.parse_known_args()
    size = arguments.prompts
    base = ("experiment=gsm8k", f"model.path={arguments.model}", f"data.source={arguments.questions}")
    settings = load_settings(*base, f"algorithm.prompts_per_step={size}", *overrides)
    group = settings.algorithm.group_size
    most = size * group
    settings.engine.max_num_seqs = settings.engine.max_num_seqs or most
    sampling = Sampling(settings.sampling.temperature, settings.sampling.max_tokens)
    prompts = load_data(settings, read_rows(settings)).prompts
    plan, engine = build_engine(settings)
    engine.load_adapter(random_adapter(plan, b_std=0.0))
    gc.freeze()

    what = {"model": Path(arguments.model).stem, "prompts": size, "group": group, "overrides": overrides}
    batches = [batch_prompts(prompts, batch, size=size, group=group) for batch in range(arguments.batches + 1)]
    warm = timed_steps(engine, new_requests(batches[0], sampling))
    print("\n---\n".join(completion.text for completion in warm.finished[:2]), flush=True)
    measured = []
    for batch, sequences in enumerate(batches[1:], start=1):
        steps = timed_steps(engine, new_requests(sequences, sampling))
        measured.append(steps)
        length = statistics.mean(map(len, sequences))
        report(benchmark="tail", **what, batch=batch, prompt_tokens=length, **summary(steps, most=most))
    everything = list(itertools.chain.from_iterable(batches[1:]))
    steps = timed_steps(engine, new_requests(everything, sampling))
    measured.append(steps)
    report(benchmark="tail-refilled", **what, **summary(steps, most=len(everything)))
    if arguments.steps:
        rows = [{"seconds": steps.seconds, "running": steps.running} for steps in measured]
        arguments.steps.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
