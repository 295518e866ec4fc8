"""The floor of each part of a step: bytes over the measured copy rate, and operations over the measured matrix rate."""

import torch

from benchmarks.common import ON_GPU, seconds
from conf.schema import Settings
from epiphany.run_plan import RunPlan
from learner.metrics import StepStats

DEVICE = "cuda" if ON_GPU else "cpu"


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product of random numbers."""
    size = 8192 if ON_GPU else 1024
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats=20)


def memory_rate() -> float:
    """Bytes/s that a large copy reads and writes."""
    size = 2**31 if ON_GPU else 2**26
    source, target = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), repeats=20)


def rollout_work(settings: Settings, plan: RunPlan, *, prompt_tokens: int) -> tuple[float, float]:
    """(bytes, FLOP) to sample one batch to its limit, all sequences at the same time.

    Each step reads every weight (the embedding is the head's, or a few rows), the adapter, and the keys and values so
    far.
    """
    shape, algorithm = plan.shape, settings.algorithm
    sequences, steps = algorithm.prompts_per_step * algorithm.group_size, settings.sampling.max_tokens
    weights = shape.weights(plan.engine.quantization) + 2 * shape.lora
    position = 2 * shape.layers * shape.keys * (1 if plan.engine.kv_cache_dtype.startswith("fp8") else 2)
    cache = sequences * position * (prompt_tokens + steps / 2)
    flop = 2 * sequences * (shape.linear + shape.other + shape.lora)
    attention = 4 * sequences * shape.layers * shape.queries * (prompt_tokens + steps / 2)
    return steps * (weights + cache), steps * (flop + attention)


def learner_flop(plan: RunPlan, stats: StepStats) -> float:
    """FLOP of a gradient over the tokens of `stats`.

    Forward and the gradient of activations (the weights are frozen), the adapter's own gradient, a second forward pass
    where activations are computed again, logits and the gradient that is made with them. Attention is left out.
    """
    shape = plan.shape
    recomputed = 2 * shape.linear if plan.way.gradient_checkpointing else 0
    per_token = 4 * shape.linear + recomputed + 6 * shape.lora
    return stats.stream_tokens * per_token + stats.trained_tokens * 4 * shape.vocabulary * shape.hidden
