"""A linear layer with one adapter as one operation, for an engine whose requests all carry that adapter.

`lora_linear` chooses by the number of rows: few (decoding) go through decode_kernels.py, many (prompts) through plain
products, for which 4-bit weights are unpacked first. Knows torch; knows no engine. Suffixes: M rows, N outputs, K
inputs, R rank, L slices that are stacked along N with an A of their own each.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

FEW_ROWS = 64
BLOCK = 64  # inputs that share a scale in nf4, and the step of the kernels
MOST_SPLITS = 16
PROGRAMS = 1024  # that keep a large GPU busy


def fits(inputs: int, rank: int, slices: int) -> bool:
    """Whether the kernels can do a layer of these sizes."""
    return inputs % BLOCK == 0 and rank >= 16 and rank & (rank - 1) == 0 and slices <= 3 and rank * slices <= 256


def can_use_kernels() -> bool:
    """Whether the GPU has what the kernels need (Ampere or newer)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def lora_linear(
    x_MK: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor | None, bias_N: torch.Tensor | None, a: torch.Tensor,
    b_NR: torch.Tensor, slices: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    """x W^T + bias + [x A_l^T B_l^T for each slice l], [M, N] in x's dtype.

    `weight` is [N, K], or nf4's packed bytes if their scales `absmax` (float32, one for 64 values of a row) are given. a is
    [L * R, K]; b_NR is already times alpha / rank; `slices` are the widths that add up to N.
    """
    if len(x_MK) > FEW_ROWS:
        return _many_rows(x_MK, weight, absmax, bias_N, a, b_NR, slices)
    return _few_rows(x_MK.contiguous(), weight, absmax, bias_N, a, b_NR, slices)


def _many_rows(
    x_MK: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor | None, bias_N: torch.Tensor | None, a: torch.Tensor,
    b_NR: torch.Tensor, slices: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    if absmax is not None:
        shape = (b_NR.shape[0], x_MK.shape[1])
        weight = torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, BLOCK, "nf4", shape, x_MK.dtype)
    out_MN = torch.nn.functional.linear(x_MK, weight, bias_N)
    down = x_MK @ a.T
    rank, start = b_NR.shape[1], 0
    for i, width in enumerate(slices):
        out_MN[:, start : start + width].addmm_(down[:, i * rank : (i + 1) * rank], b_NR[start : start + width].T)
        start += width
    return out_MN


def _few_rows(
    x_MK: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor | None, bias_N: torch.Tensor | None, a: torch.Tensor,
    b_NR: torch.Tensor, slices: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    from actors import decode_kernels

    kernels: Any = decode_kernels
    (rows, inputs), (outputs, rank) = x_MK.shape, b_NR.shape
    bm = max(16, _power_of_2(rows))
    down_splits = _divisor(inputs // BLOCK, MOST_SPLITS)
    down = torch.empty(down_splits * rows * len(a), dtype=torch.float32, device=x_MK.device)
    # The adapter's first product runs beside the layer's own: neither fills the card.
    here, beside = torch.cuda.current_stream(), _side_stream(x_MK.device)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        kernels.shrink[(down_splits,)](
            x_MK, a, down, rows, K=inputs, ROWS=len(a), SPLITS=down_splits, BM=bm, BA=max(16, _power_of_2(len(a))),
            num_stages=3,
        )  # fmt: skip
    if absmax is None:
        base, splits = torch.nn.functional.linear(x_MK, weight, bias_N), 0
        bias_N, out_MN = None, base
    else:
        tiles = -(-outputs // 64)
        # Partial sums are written and read again: the more rows, the fewer parts.
        splits = _divisor(inputs // BLOCK, max(1, min(MOST_SPLITS, 256 // bm, -(-PROGRAMS // tiles))))
        base = torch.empty(splits * rows * outputs, dtype=torch.float32, device=x_MK.device)
        kernels.nf4_product[(tiles, splits)](
            x_MK, weight, absmax, base, rows, outputs, K=inputs, SPLITS=splits, BM=bm, BN=64, num_warps=4, num_stages=3
        )
        out_MN = x_MK.new_empty(rows, outputs)
    here.wait_stream(beside)
    ends = [sum(slices[: i + 1]) for i in range(2)]
    bn = 64 if outputs <= 8192 else 128
    kernels.finish[(-(-outputs // bn),)](
        base, bias_N, down, b_NR, out_MN, rows, outputs, ends[0], ends[1], R=rank, SLICES=len(slices), BASE_SPLITS=splits,
        DOWN_SPLITS=down_splits, HAS_BIAS=bias_N is not None, BM=bm, BN=bn, num_warps=4,
    )  # fmt: skip
    return out_MN


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)


def _power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _shape_of(
    x_MK: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor | None, bias_N: torch.Tensor | None, a: torch.Tensor,
    b_NR: torch.Tensor, slices: Sequence[int],
) -> torch.Tensor:  # fmt: skip
    return x_MK.new_empty(x_MK.shape[0], b_NR.shape[0])


# torch.ops.epiphany.lora_linear: opaque to compilers, which see its shape only.
torch.library.define(
    "epiphany::lora_linear",
    "(Tensor x, Tensor weight, Tensor? absmax, Tensor? bias, Tensor a, Tensor b, int[] slices) -> Tensor",
)
torch.library.impl("epiphany::lora_linear", "CompositeExplicitAutograd", lora_linear)
torch.library.register_fake("epiphany::lora_linear", _shape_of)
