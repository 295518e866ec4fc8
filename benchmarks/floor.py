"""The floor of each part of a step: bytes over the card's measured copy rate, and operations over its measured matrix rate."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from conf.schema import Settings
from learner.memory import ModelShape
from learner.stats import StepStats

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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product of random numbers."""
    size = 8192 if torch.cuda.is_available() else 1024
    a, b = (torch.randn(size, size, device=_device()).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats=20)


def memory_rate() -> float:
    """Bytes/s that a large copy reads and writes."""
    size = 2**31 if torch.cuda.is_available() else 2**26
    source, target = (torch.zeros(size, dtype=torch.uint8, device=_device()) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), repeats=20)


def rollout_work(settings: Settings, shape: ModelShape, prompt_tokens: int) -> tuple[float, float]:
    """(bytes, FLOP) to sample one batch to its limit, all sequences at once: each step reads every weight (the embedding
    is the head's, or a few rows), the adapter, and the keys and values so far."""
    s = settings
    sequences, steps = s.algorithm.prompts_per_step * s.algorithm.group_size, s.sampling.max_tokens
    weights = shape.weights(s.model.quantization) + 2 * shape.lora
    position = 2 * shape.layers * shape.keys * (1 if s.engine.kv_cache_dtype.startswith("fp8") else 2)
    cache = sequences * position * (prompt_tokens + steps / 2)
    flop = 2 * sequences * (shape.linear + shape.other + shape.lora)
    attention = 4 * sequences * shape.layers * shape.queries * (prompt_tokens + steps / 2)
    return steps * (weights + cache), steps * (flop + attention)


def learner_flop(settings: Settings, shape: ModelShape, stats: StepStats) -> float:
    """FLOP of a gradient over these tokens: forward and the gradient of activations (the weights are frozen), the
    adapter's own gradient, a second forward pass where activations are computed again, logits and the gradient that is
    made with them. Attention is left out."""
    recomputed = 2 * shape.linear if settings.learner.gradient_checkpointing else 0
    per_token = 4 * shape.linear + recomputed + 6 * shape.lora
    return stats.stream_tokens * per_token + stats.trained_tokens * 4 * shape.vocabulary * shape.hidden
