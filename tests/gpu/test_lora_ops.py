"""The engine's linear layers with their adapter, in one operation, against float64."""

import pytest
import torch

from actors.engines.vllm.lora_linear import LoraLayer, lora_linear
from tests.helpers.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_nf4", [False, True])
@pytest.mark.parametrize("slices", [[576], [896, 128, 128], [200, 456], [1536, 256, 256]])
@pytest.mark.parametrize("inputs", [576, 1536])
def test_lora_linear_equals_float64(dtype: torch.dtype, is_nf4: bool, slices: list[int], inputs: int):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    outputs, rank = sum(slices), 16
    weight = torch.randn(outputs, inputs, device="cuda", dtype=dtype)
    packed, absmax, plain = weight, None, weight.double()
    if is_nf4:
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        absmax, plain = state.absmax, dequantize_4bit(packed, state).double()
    bias = torch.randn(outputs, device="cuda", dtype=dtype)
    a = torch.randn(len(slices) * rank, inputs, device="cuda", dtype=dtype)
    b = torch.randn(outputs, rank, device="cuda", dtype=dtype)
    for rows in (1, 5, 16, 33, 64, 65, 300):
        x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
        out = lora_linear(x, LoraLayer(packed, absmax, bias, a, b, slices))
        down = (x.double() @ a.double().T).split(rank, dim=1)
        delta = [d @ w.double().T for d, w in zip(down, b.split(slices), strict=True)]
        expected = x.double() @ plain.T + bias.double() + torch.cat(delta, dim=1)
        assert float((out - expected).norm() / expected.norm()) < 5e-3, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_unpacks_the_learners_weights(dtype: torch.dtype):
    """Rows that pick one input each show the weights that the kernel computes with."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(torch.randn(256, 64, device="cuda", dtype=dtype), quant_type="nf4", blocksize=64)
    no_a, no_b = torch.zeros(16, 64, device="cuda", dtype=dtype), torch.zeros(256, 16, device="cuda", dtype=dtype)
    eye = torch.eye(64, device="cuda", dtype=dtype)
    unpacked = lora_linear(eye, LoraLayer(packed, state.absmax, None, no_a, no_b, [256])).T
    expected = dequantize_4bit(packed, state)
    # 16 bits of the table against 24: hardly any product rounds to the other side.
    assert (unpacked == expected).float().mean() > 0.99
    torch.testing.assert_close(unpacked, expected, atol=0, rtol=1e-2)
