"""The Triton kernel of softmax.py: one program a row, which it reads twice and writes once. Imported on a GPU only."""

import triton
import triton.language as tl


@triton.jit
def softmax_rows(logits, stride, targets, logprobs, entropies, vocabulary, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * stride
    # Read before the row is overwritten; the reductions below are barriers.
    target = tl.load(start_of_row + tl.load(targets + row)).to(tl.float32) * inverse_temperature
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(start_of_row + at, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        new_highest = tl.maximum(highest, tl.max(z, 0))
        shrink = tl.exp(highest - new_highest)
        e = tl.exp(z - new_highest)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(tl.where(inside, e * z, 0.0), 0)
        highest = new_highest
    log_total = highest + tl.log(total)
    tl.store(logprobs + row, target - log_total)
    tl.store(entropies + row, log_total - weighted / total)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        z = tl.load(start_of_row + at, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        tl.store(start_of_row + at, tl.exp(z - log_total).to(logits.dtype.element_ty), mask=inside)
