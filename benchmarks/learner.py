"""The learner alone: `python -m benchmarks.learner [case] [override ...]` prints one JSON line.

Tokens a second on the rows of a case (benchmarks/work.py) without an engine, the arithmetic that they need, and its
share of the rate at which the card multiplies large matrices.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.common import ON_GPU, build_learner, report, seconds
from benchmarks.floor import learner_flop, matrix_rate
from benchmarks.work import CASES, PROMPT_TOKENS, random_rollouts, work_settings


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    parser.add_argument("--warm", type=int, default=2, help="steps before those that count, after a first one")
    parser.add_argument("--repeats", type=int, default=6, help="steps that count")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings(arguments.case, Path(folder), "engine.share_weights=never", *overrides)
        plan, learner = build_learner(settings)
    table = random_rollouts(settings, plan.shape.vocabulary)
    stats = learner.step(table)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: learner.step(table), warm=arguments.warm, repeats=arguments.repeats)
    flop = learner_flop(plan, stats, settings, prompt_tokens=PROMPT_TOKENS)
    rate = matrix_rate(learner.policy.dtype)
    report(
        benchmark="learner",
        case=arguments.case,
        overrides=overrides,
        seconds=took,
        completion_tokens_per_second=stats.trained_tokens / took,
        stream_tokens_per_second=stats.stream_tokens / took,
        tflop=flop / 1e12,
        tflop_per_second=flop / took / 1e12,
        matrix_tflop_per_second=rate / 1e12,
        share_of_matrix_rate=flop / took / rate,
        micro_batch_tokens=plan.way.micro_batch_tokens,
        torch_allocated_highest_gib=torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else None,
    )


if __name__ == "__main__":
    main()
