"""The engine's linear layers with their adapter, in one operation, against float64."""

import pytest
import torch

from actors.engines.vllm.lora_linear import LoraLayer, lora_linear
from tests.helpers.gpu import NEEDS_GPU
from tests.helpers.nf4 import weight_of_slices

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", ["none", "nf4", "double"])
@pytest.mark.parametrize("slices", [[1024], [1024, 256, 256], [256, 768], [1536, 256, 256]])
@pytest.mark.parametrize("inputs", [576, 1536, 8960])
def test_lora_linear_equals_float64(dtype: torch.dtype, quantization: str, slices: list[int], inputs: int):
    outputs, rank = sum(slices), 16
    packed, scales, weight = weight_of_slices(slices, inputs, quantization, dtype=dtype, device="cuda")
    plain = weight.double()
    bias = torch.randn(outputs, device="cuda", dtype=dtype)
    a = torch.randn(len(slices) * rank, inputs, device="cuda", dtype=dtype)
    b = torch.randn(outputs, rank, device="cuda", dtype=dtype)
    for rows in (1, 5, 16, 33, 64, 65, 300):
        x = torch.randn(rows, inputs, device="cuda", dtype=dtype)
        out = lora_linear(x, LoraLayer(packed, scales, bias, a, b, slices))
        down = (x.double() @ a.double().T).split(rank, dim=1)
        delta = [d @ w.double().T for d, w in zip(down, b.split(slices), strict=True)]
        expected = x.double() @ plain.T + bias.double() + torch.cat(delta, dim=1)
        assert float((out - expected).norm() / expected.norm()) < 5e-3, rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", ["nf4", "double"])
def test_the_kernel_unpacks_the_learners_weights(dtype: torch.dtype, quantization: str):
    """Rows that pick one input each show the weights that the kernel computes with."""
    packed, scales, expected = weight_of_slices([256], 64, quantization, dtype=dtype, device="cuda")
    no_a, no_b = torch.zeros(16, 64, device="cuda", dtype=dtype), torch.zeros(256, 16, device="cuda", dtype=dtype)
    eye = torch.eye(64, device="cuda", dtype=dtype)
    unpacked = lora_linear(eye, LoraLayer(packed, scales, None, no_a, no_b, [256])).T
    # 16 bits of the table against 24: hardly any product rounds to the other side.
    assert (unpacked == expected).float().mean() > 0.99
    torch.testing.assert_close(unpacked, expected, atol=0, rtol=1e-2)
