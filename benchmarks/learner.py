"""The learner alone: `python -m benchmarks.learner [case] [override ...]` prints one JSON line.

Tokens a second on the rows of a case (benchmarks/work.py) without an engine, the arithmetic that they need, and its
share of the rate at which the card multiplies large matrices.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from actors.build import build_machine, build_model_source
from benchmarks.common import report
from benchmarks.floor import learner_flop, matrix_rate, seconds
from benchmarks.work import CASES, random_rollouts, work_settings
from learner.build import build_learner, draw


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings(arguments.case, Path(folder), "engine.share_weights=never", *overrides)
        machine = build_machine(settings)
        source, _ = build_model_source(settings)
        blueprint = draw(settings, machine, source)
        learner, _ = build_learner(blueprint)
    lora = learner.policy.lora
    lora.flat.detach()[lora.layout.start_of_b :].normal_(0, 1e-4)
    table = random_rollouts(blueprint.settings, blueprint.shape.vocabulary)
    stats = learner.step(table)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: learner.step(table))
    flop = learner_flop(blueprint.settings, blueprint.shape, stats)
    rate = matrix_rate(learner.policy.dtype)
    report(
        benchmark="learner", case=arguments.case, overrides=overrides, seconds=took,
        completion_tokens_per_second=stats.trained_tokens / took, stream_tokens_per_second=stats.stream_tokens / took,
        tflop=flop / 1e12, tflop_per_second=flop / took / 1e12, matrix_tflop_per_second=rate / 1e12,
        share_of_matrix_rate=flop / took / rate, micro_batch_tokens=blueprint.settings.learner.micro_batch_tokens,
        torch_allocated_highest_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
