"""The learner alone: `python -m benchmarks.learner [case] [override ...]` prints one JSON line.

Tokens a second on the rows of a case (benchmarks/work.py) without an engine, the arithmetic that they need, and its
share of the rate at which the card multiplies large matrices.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actors.build import build_machine, build_model_source
from benchmarks.common import report
from benchmarks.work import CASES, random_rollouts, work_settings
from learner.build import build_learner, draw

WARM, REPEATS = 2, 6


def seconds(action: Callable[[], Any], *, warm: int = WARM, repeats: int = REPEATS) -> float:
    """Median seconds of `action`, the device's work included."""
    times = []
    for i in range(warm + repeats):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i >= warm:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(size: int, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats=20)


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
    config = blueprint.skeleton.config
    table = random_rollouts(blueprint.settings, config.vocab_size)
    stats = learner.step(table)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: learner.step(table))
    linear = sum(e.shape[1] * b.shape[0] for e, b in _pairs(lora.layout))
    # Forward and the gradient of activations (weights are frozen); the adapter's own gradient, too; a second forward
    # pass where activations are computed again. Logits and the gradient that is made with them. Attention is left out.
    recomputed = 2 * linear if blueprint.settings.learner.gradient_checkpointing else 0
    flop = stats.stream_tokens * (4 * linear + recomputed + 6 * lora.layout.size)
    flop += stats.trained_tokens * 4 * config.vocab_size * config.hidden_size
    rate = matrix_rate(8192 if torch.cuda.is_available() else 1024, learner.policy.dtype)
    report(
        benchmark="learner", case=arguments.case, overrides=overrides, seconds=took,
        completion_tokens_per_second=stats.trained_tokens / took, stream_tokens_per_second=stats.stream_tokens / took,
        tflop=flop / 1e12, tflop_per_second=flop / took / 1e12, matrix_tflop_per_second=rate / 1e12,
        share_of_matrix_rate=flop / took / rate, micro_batch_tokens=blueprint.settings.learner.micro_batch_tokens,
        torch_allocated_highest_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    )  # fmt: skip


def _pairs(layout: Any) -> list[tuple[Any, Any]]:
    """Each module's A and B entries: their outer sizes are the layer's."""
    sides = {side: [e for e in layout.entries if e.side == side] for side in "AB"}
    return list(zip(sides["A"], sides["B"], strict=True))


if __name__ == "__main__":
    main()
