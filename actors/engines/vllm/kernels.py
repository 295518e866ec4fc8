"""Triton kernels for a linear layer with one adapter over few rows, as in decoding. Imported on a GPU only.

A layer takes two or three launches: `shrink` makes x A^T, `nf4_product` makes x W^T from 4-bit weights without
unpacking them in memory, and `finish` adds their partial sums over K, the bias and (x A^T) B^T. Suffixes of
shapes: M rows, N outputs, K inputs, R rank.
"""

import triton
import triton.language as tl

from actors.engines.vllm.nf4_unpack import unpack_ptx

UNPACK = tl.constexpr(unpack_ptx())
EIGHT_TO_ONE = tl.constexpr(",".join(["=r"] * 8 + ["r"]))


@triton.jit(do_not_specialize=["M"])
def nf4_product(
    x,
    packed,
    scales,
    code,
    factors,
    offsets,
    partial,
    M,
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """partial[s] = x W^T over the s-th part of K, in float32. packed [N, K / 2], scales [N, K / 64].

    The scales are float32 if SCALE_BLOCK is 0; else bytes, and scale i is code[byte] * factors[i / SCALE_BLOCK] +
    offsets[i / SCALE_BLOCK]. W is the left operand of the product, so that few rows waste little of the matrix units.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    m = tl.arange(0, BM)
    byte = tl.arange(0, 32)
    in_n, in_m = n < N, m < M
    acc = tl.zeros((BN, BM), tl.float32)
    PART: tl.constexpr = K // SPLITS
    for i in range(0, PART // 64):
        k = split * PART + i * 64
        both = tl.load(packed + n[:, None] * (K // 2) + (k // 2 + byte)[None, :], mask=in_n[:, None], other=0)
        place = n * (K // 64) + k // 64
        if SCALE_BLOCK:
            value = tl.load(code + tl.load(scales + place, mask=in_n, other=0).to(tl.int32))
            factor = tl.load(factors + place // SCALE_BLOCK, mask=in_n, other=0.0)
            # Rounded before the sum, as bitsandbytes does: fused, some scales would differ in their last bit.
            product = tl.inline_asm_elementwise(
                "mul.rn.f32 $0, $1, $2;", "=f,f,f", [value, factor], dtype=tl.float32, is_pure=True, pack=1
            )
            scale = product + tl.load(offsets + place // SCALE_BLOCK, mask=in_n, other=0.0)
        else:
            scale = tl.load(scales + place, mask=in_n, other=0.0)
        even = tl.load(x + m[None, :] * K + (k + 2 * byte)[:, None], mask=in_m[None, :], other=0.0)
        odd = tl.load(x + m[None, :] * K + (k + 2 * byte + 1)[:, None], mask=in_m[None, :], other=0.0)
        high, low = tl.inline_asm_elementwise(
            UNPACK, EIGHT_TO_ONE, [both], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
        )
        # As bitsandbytes unpacks: the product in float32, rounded once to what the learner computes with.
        w_even = (high.to(tl.float32, bitcast=True) * scale[:, None]).to(x.dtype.element_ty)
        w_odd = (low.to(tl.float32, bitcast=True) * scale[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(w_even, even, acc)
        acc = tl.dot(w_odd, odd, acc)
    pointers = partial + (split * M + m[None, :]) * N + n[:, None]
    tl.store(pointers, acc, mask=in_n[:, None] & in_m[None, :])


@triton.jit(do_not_specialize=["M"])
def shrink(
    x, a, partial, M, K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BA: tl.constexpr
):
    """partial[s] = x A^T over the s-th part of K, in float32. a [ROWS, K] holds the A of every slice; BA >= ROWS."""
    split = tl.program_id(0)
    m, j, c = tl.arange(0, BM), tl.arange(0, BA), tl.arange(0, 64)
    in_m, in_a = m < M, j < ROWS
    acc = tl.zeros((BM, BA), tl.float32)
    PART: tl.constexpr = K // SPLITS
    for i in range(0, PART // 64):
        k = split * PART + i * 64 + c
        rows = tl.load(x + m[:, None] * K + k[None, :], mask=in_m[:, None], other=0.0)
        adapter = tl.load(a + j[None, :] * K + k[:, None], mask=in_a[None, :], other=0.0)
        acc = tl.dot(rows, adapter, acc)
    pointers = partial + (split * M + m[:, None]) * ROWS + j[None, :]
    tl.store(pointers, acc, mask=in_m[:, None] & in_a[None, :])


@triton.jit(do_not_specialize=["M"])
def finish(
    base,
    bias,
    down,
    b,
    out,
    M,
    N,
    END_0,
    END_1,
    R: tl.constexpr,
    SLICES: tl.constexpr,
    BASE_SPLITS: tl.constexpr,
    DOWN_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out = base + bias + down B^T, [M, N].

    `base` is a finished product [M, N] (BASE_SPLITS 0) or the partial sums of nf4_product; `down` holds those of
    shrink. b [N, R] holds the B of every slice; slices end at END_0, END_1 and N.
    """
    first = tl.program_id(0) * BN
    n, m, r = first + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, R)
    in_n, in_m = n < N, m < M
    inside = in_m[:, None] & in_n[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    if BASE_SPLITS == 0:
        acc += tl.load(base + m[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        for s in tl.static_range(BASE_SPLITS):
            acc += tl.load(base + (s * M + m[:, None]) * N + n[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(SLICES):
        start = 0 if i == 0 else (END_0 if i == 1 else END_1)
        end = N if i == SLICES - 1 else (END_0 if i == 0 else END_1)
        if (first < end) & (first + BN > start):
            x_a = tl.zeros((BM, R), tl.float32)
            for s in tl.static_range(DOWN_SPLITS):
                pointers = down + (s * M + m[:, None]) * (SLICES * R) + i * R + r[None, :]
                x_a += tl.load(pointers, mask=in_m[:, None], other=0.0)
            of_slice = (n >= start) & (n < end)
            b_t = tl.load(b + n[None, :] * R + r[:, None], mask=of_slice[None, :], other=0.0)
            acc = tl.dot(x_a.to(b_t.dtype), b_t, acc)
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)
