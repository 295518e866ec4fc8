"""The Triton kernel of softmax.py: one program per row, which reads the row twice and writes it once.

Import it on a GPU only. Row `row` of `logits` starts at `row * stride` and has `vocabulary` entries; `targets` has one
index per row; `logprobs` and `entropies` (float32, one per row, nats) and the logits are written.
"""

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
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        scaled = tl.load(start_of_row + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        new_highest = tl.maximum(highest, tl.max(scaled, 0))
        shrink = tl.exp(highest - new_highest)
        exponentials = tl.exp(scaled - new_highest)
        total = total * shrink + tl.sum(exponentials, 0)
        weighted = weighted * shrink + tl.sum(tl.where(inside, exponentials * scaled, 0.0), 0)
        highest = new_highest
    log_total = highest + tl.log(total)
    tl.store(logprobs + row, target - log_total)
    tl.store(entropies + row, log_total - weighted / total)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        scaled = tl.load(start_of_row + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        tl.store(start_of_row + columns, tl.exp(scaled - log_total).to(logits.dtype.element_ty), mask=inside)
