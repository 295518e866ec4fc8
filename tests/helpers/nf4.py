"""A layer of several slices in nf4, as vLLM holds it."""

from collections.abc import Sequence
from typing import cast

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from actors.models.nf4_scales import Nf4State, join_scales


def weight_of_slices(
    slices: Sequence[int], inputs: int, quantization: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """A random weight as LoraLayer takes it: stored, the scales of its slices, and what it stands for.

    `quantization` is none, nf4, or double for nf4 with double quantization.
    """
    weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) for outputs in slices]
    if quantization == "none":
        return torch.cat(weights), [], torch.cat(weights)
    is_double = quantization == "double"
    quantized = [quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=is_double) for w in weights]
    plain = torch.cat([dequantize_4bit(packed, state) for packed, state in quantized])
    return (
        torch.cat([packed for packed, _ in quantized]),
        join_scales([cast("Nf4State", state) for _, state in quantized]),
        plain,
    )
