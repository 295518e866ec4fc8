"""A linear layer with one adapter as one operation, for an engine whose requests all carry that adapter.

`lora_linear` chooses by the number of rows: few (decoding) go through kernels.py, many (prompts) through plain
products, for which 4-bit weights are unpacked first. Knows torch; knows no engine. Suffixes: M rows, N outputs, K
inputs, R rank.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from actors.models.nf4_scales import BLOCK, SCALE_BLOCK, plain_scales

FEW_ROWS = 64
MAX_SPLITS = 16
PROGRAMS = 1024  # enough to keep a large GPU busy


class LoraLayer(NamedTuple):
    """The tensors of a layer of one or more slices, which are stacked along N and have an A of their own each.

    `weight` is [N, K], or nf4's packed bytes if there are `scales`: one tensor of them, or four that say it in fewer
    bytes (nf4_scales.py). `a` is [slices * R, K] with the A of every slice; `b_NR` is already times alpha / rank.
    `widths` are the outputs of each slice and add up to N.
    """

    weight: torch.Tensor
    scales: Sequence[torch.Tensor]
    bias_N: torch.Tensor | None
    a: torch.Tensor
    b_NR: torch.Tensor
    widths: Sequence[int]


def supports(inputs: int, rank: int, slices: int) -> bool:
    """Whether the kernels can compute a layer of these sizes."""
    return inputs % BLOCK == 0 and rank >= 16 and rank & (rank - 1) == 0 and slices <= 3 and rank * slices <= 256


def can_use_kernels() -> bool:
    """Whether the GPU has what the kernels need (Ampere or newer)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def lora_linear(x_MK: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """x W^T + bias + [x A_l^T B_l^T for each slice l], [M, N] in x's dtype."""
    return _many_rows(x_MK, layer) if len(x_MK) > FEW_ROWS else _few_rows(x_MK.contiguous(), layer)


def _many_rows(x_MK: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    weight, scales, bias_N, a, b_NR, widths = layer
    if scales:
        absmax = plain_scales(scales)
        shape = (b_NR.shape[0], x_MK.shape[1])
        weight = torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, BLOCK, "nf4", shape, x_MK.dtype)
    out_MN = torch.nn.functional.linear(x_MK, weight, bias_N)
    down = x_MK @ a.T
    rank, start = b_NR.shape[1], 0
    for i, width in enumerate(widths):
        out_MN[:, start : start + width].addmm_(down[:, i * rank : (i + 1) * rank], b_NR[start : start + width].T)
        start += width
    return out_MN


def _few_rows(x_MK: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    from actors.engines.vllm import kernels as kernel_module

    kernels: Any = kernel_module  # a Triton function is indexed by its grid, which its type does not say
    weight, scales, bias_N, a, b_NR, widths = layer
    (rows, inputs), (outputs, rank) = x_MK.shape, b_NR.shape
    bm = max(16, _power_of_2(rows))
    down_splits = _largest_divisor(inputs // BLOCK, MAX_SPLITS)
    down = torch.empty(down_splits * rows * len(a), dtype=torch.float32, device=x_MK.device)
    # The adapter's first product runs beside the layer's own: neither fills the GPU.
    main, side = torch.cuda.current_stream(), _side_stream(x_MK.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        kernels.shrink[(down_splits,)](
            x_MK,
            a,
            down,
            rows,
            K=inputs,
            ROWS=len(a),
            SPLITS=down_splits,
            BM=bm,
            BA=max(16, _power_of_2(len(a))),
            num_stages=3,
        )
    if not scales:
        base, splits = torch.nn.functional.linear(x_MK, weight, bias_N), 0
        bias_N, out_MN = None, base
    else:
        tiles = -(-outputs // 64)
        # Partial sums are written and read again: the more rows, the fewer parts.
        splits = _largest_divisor(inputs // BLOCK, max(1, min(MAX_SPLITS, 256 // bm, -(-PROGRAMS // tiles))))
        base = torch.empty(splits * rows * outputs, dtype=torch.float32, device=x_MK.device)
        kernels.nf4_product[(tiles, splits)](
            x_MK,
            weight,
            *(scales if len(scales) > 1 else [scales[0]] * 4),
            base,
            rows,
            outputs,
            K=inputs,
            SPLITS=splits,
            SCALE_BLOCK=SCALE_BLOCK if len(scales) > 1 else 0,
            BM=bm,
            BN=64,
            num_warps=4,
            num_stages=3,
        )
        out_MN = x_MK.new_empty(rows, outputs)
    main.wait_stream(side)
    ends = [sum(widths[: i + 1]) for i in range(2)]
    bn = 64 if outputs <= 8192 else 128
    kernels.finish[(-(-outputs // bn),)](
        base,
        bias_N,
        down,
        b_NR,
        out_MN,
        rows,
        outputs,
        ends[0],
        ends[1],
        R=rank,
        SLICES=len(widths),
        BASE_SPLITS=splits,
        DOWN_SPLITS=down_splits,
        HAS_BIAS=bias_N is not None,
        BM=bm,
        BN=bn,
        num_warps=4,
    )
    return out_MN


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(d for d in range(1, limit + 1) if number % d == 0)


def _power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


# torch.ops.epiphany.lora_linear(x, *layer): opaque to compilers, which see its shape only.
torch.library.define(
    "epiphany::lora_linear",
    "(Tensor x, Tensor weight, Tensor[] scales, Tensor? bias, Tensor a, Tensor b, int[] widths) -> Tensor",
)
torch.library.impl(
    "epiphany::lora_linear", "CompositeExplicitAutograd", lambda x, *layer: lora_linear(x, LoraLayer(*layer))
)
torch.library.register_fake(
    "epiphany::lora_linear", lambda x, *layer: x.new_empty(x.shape[0], LoraLayer(*layer).b_NR.shape[0])
)
