"""A linear layer with its adapter: the plain path, which the GPU's kernels are held to (tests/gpu)."""

from typing import cast

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise, quantize_4bit

from actors.engines.vllm.lora_linear import _largest_divisor, supports
from actors.models.nf4_scales import Nf4State, can_join, join_scales, plain_scales
from tests.helpers.nf4 import weight_of_slices


@pytest.mark.parametrize("quantization", ["none", "nf4", "double"])
def test_slices_have_an_adapter_each(quantization: str):
    rows, inputs, slices, rank = 70, 256, [64, 128, 64], 16
    x, bias = torch.randn(rows, inputs), torch.randn(256)
    a, b = torch.randn(3 * rank, inputs), torch.randn(256, rank)
    packed, scales, plain = weight_of_slices(slices, inputs, quantization)
    outputs = torch.ops.epiphany.lora_linear(x, packed, scales, bias, a, b, slices)
    expected = x @ plain.T + bias
    expected[:, :64] += x @ a[:16].T @ b[:64].T
    expected[:, 64:192] += x @ a[16:32].T @ b[64:192].T
    expected[:, 192:] += x @ a[32:].T @ b[192:].T
    torch.testing.assert_close(outputs, expected, atol=1e-3, rtol=1e-4)


def twice_scaled(outputs: int, inputs: int) -> Nf4State:
    _, state = quantize_4bit(torch.randn(outputs, inputs), quant_type="nf4", compress_statistics=True)
    return cast("Nf4State", state)


def unpacked(state: Nf4State) -> torch.Tensor:
    return dequantize_blockwise(state.absmax, cast("QuantState", state.state2)) + state.offset


def test_joined_scales_are_those_of_the_slices_to_the_bit():
    states = [twice_scaled(64, 256) for _ in range(3)]
    expected = [unpacked(state) for state in states]
    assert can_join(states)
    joined = join_scales(states)
    assert torch.equal(plain_scales(joined), torch.cat(expected))
    # Each slice's own state, which the learner unpacks, is a view of what was joined.
    for state, scales in zip(states, expected, strict=True):
        assert torch.equal(unpacked(state), scales)
        assert state.absmax.untyped_storage().data_ptr() == joined[0].untyped_storage().data_ptr()


def test_scales_that_fill_no_block_of_their_own_are_not_joined():
    uneven, even = twice_scaled(64, 192), twice_scaled(256, 192)
    assert not can_join([even, uneven]) and can_join([even, even])
    plain = cast("Nf4State", quantize_4bit(torch.randn(64, 256), quant_type="nf4")[1])
    assert not can_join([plain]) and torch.equal(join_scales([plain])[0], plain.absmax)


def test_which_layers_are_supported():
    assert supports(1536, 16, 3) and supports(8960, 64, 1)
    assert not supports(1500, 16, 1)  # not a whole number of nf4 blocks
    assert not supports(1536, 8, 1) and not supports(1536, 24, 1)
    assert not supports(1536, 16, 4)


def test_parts_of_k_divide_it():
    assert [_largest_divisor(k // 64, 16) for k in (576, 1536, 8960, 4096, 64)] == [9, 12, 14, 16, 1]
