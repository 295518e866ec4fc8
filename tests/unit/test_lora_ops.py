"""A linear layer with its adapter: the plain path, which the GPU's kernels are held to (tests/gpu)."""

import pytest
import torch

from actors.engines.vllm.lora_linear import _largest_divisor, supports


@pytest.mark.parametrize("is_nf4", [False, True])
def test_slices_have_an_adapter_each(is_nf4: bool):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows, inputs, slices, rank = 70, 128, [32, 64, 32], 16
    x, weight, bias = torch.randn(rows, inputs), torch.randn(128, inputs), torch.randn(128)
    a, b = torch.randn(3 * rank, inputs), torch.randn(128, rank)
    packed, absmax, plain = weight, None, weight
    if is_nf4:
        packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        absmax, plain = state.absmax, dequantize_4bit(packed, state)
    outputs = torch.ops.epiphany.lora_linear(x, packed, absmax, bias, a, b, slices)
    expected = x @ plain.T + bias
    expected[:, :32] += x @ a[:16].T @ b[:32].T
    expected[:, 32:96] += x @ a[16:32].T @ b[32:96].T
    expected[:, 96:] += x @ a[32:].T @ b[96:].T
    torch.testing.assert_close(outputs, expected, atol=1e-3, rtol=1e-4)


def test_which_layers_are_supported():
    assert supports(1536, 16, 3) and supports(8960, 64, 1)
    assert not supports(1500, 16, 1)  # not a whole number of nf4 blocks
    assert not supports(1536, 8, 1) and not supports(1536, 24, 1)
    assert not supports(1536, 16, 4)


def test_parts_of_k_divide_it():
    assert [_largest_divisor(k // 64, 16) for k in (576, 1536, 8960, 4096, 64)] == [9, 12, 14, 16, 1]
