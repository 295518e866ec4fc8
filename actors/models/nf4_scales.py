"""The scales of nf4 weights, plain or double-quantized, joined over the slices of a layer.

A layer's `scales` are one float32 tensor with the scale of each BLOCK values; or, quantized themselves, four: a byte
for each, the 256 numbers (float32) that bytes stand for, and a factor and an offset (float32) for each SCALE_BLOCK of
them. A scale is number * factor + offset. Knows bitsandbytes' states; knows no engine.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

BLOCK = 64  # inputs that share a scale, and the step of the kernels
SCALE_BLOCK = 256  # scales that share a factor


class _ScaleState(Protocol):
    """bitsandbytes' state of quantized scales."""

    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int


class Nf4State(Protocol):
    """bitsandbytes' QuantState of an nf4 weight. `state2` and `offset` are there if it is `nested`."""

    quant_type: str
    blocksize: int
    nested: bool
    absmax: torch.Tensor
    state2: _ScaleState
    offset: torch.Tensor


def plain_scales(scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """A float32 scale for 64 values, as bitsandbytes computes it from the two levels of double quantization."""
    if len(scales) == 1:
        return scales[0]
    indices, code, factors, offsets = scales
    products = torch.ops.bitsandbytes.dequantize_blockwise(indices, factors, code, SCALE_BLOCK, torch.float32)
    return products.view(-1, SCALE_BLOCK).add_(offsets[:, None]).view(-1)


def can_join(states: Sequence[Nf4State]) -> bool:
    """Whether the quantized scales of these slices may lie end to end: each fills its blocks, and bytes mean the
    same.
    """
    return all(
        s.nested
        and s.state2.blocksize == SCALE_BLOCK
        and len(s.absmax) % SCALE_BLOCK == 0
        and torch.equal(s.state2.code, states[0].state2.code)
        for s in states
    )


def join_scales(states: Sequence[Nf4State]) -> list[torch.Tensor]:
    """The scales of slices end to end, as LoraLayer has them. Those of each state become views of them."""
    joined = torch.cat([s.absmax for s in states])
    for state, absmax in zip(states, joined.split([len(s.absmax) for s in states]), strict=True):
        state.absmax = absmax
    if not states[0].nested:
        return [joined]
    counts = [len(s.state2.absmax) for s in states]
    factors = torch.cat([s.state2.absmax for s in states])
    for state, absmax in zip(states, factors.split(counts), strict=True):
        state.state2.absmax, state.state2.code = absmax, states[0].state2.code
    offsets = torch.cat([s.offset.float().expand(count) for s, count in zip(states, counts, strict=True)])
    return [joined, states[0].state2.code, factors, offsets]
