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


def learner_flop(plan: RunPlan, stats: StepStats, settings: Settings, *, prompt_tokens: int) -> float:
    """FLOP of a gradient over the tokens of `stats`, of answers at full length.

    Forward and the gradient of activations (the weights are frozen), the adapter's own gradient, a second forward pass
    where activations are computed again, logits and the gradient that is made with them. Attention: a product of each
    query with half of the keys in its sequence and one with their values, and twice as much in backward.
    """
    shape, passes = plan.shape, 3 if plan.way.gradient_checkpointing else 2
    per_token = 2 * passes * shape.linear + 6 * shape.lora
    tokens = settings.sampling.max_tokens
    pairs = prompt_tokens**2 / 2 + settings.algorithm.group_size * tokens * (prompt_tokens + tokens / 2)
    attention = 4 * shape.queries * shape.layers * settings.algorithm.prompts_per_step * pairs * (passes + 1)
    logits = 4 * shape.vocabulary * shape.hidden
    return stats.stream_tokens * per_token + stats.trained_tokens * logits + attention
