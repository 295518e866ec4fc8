"""The packed, prefix-shared policy against plain forward passes, and the learner's micro-batches."""

import pickle
from pathlib import Path

import pytest
import torch

from actors.engines.base import Diverged
from actors.types import Adapter, AdapterEntry, AdapterLayout
from learner import learner as learner_module
from learner.batch import Rollouts
from learner.learner import FIRST_LOSS_SCALE, Learner
from learner.micro_batch_limit import OutOfMemory
from learner.minibatches import MicroBatch, micro_batches
from learner.model.policy import Tokens
from tests.helpers.learners import a_table, gradient_of, make_learner, make_policy, plain_logprobs
from tests.helpers.presets import algorithm
from tests.helpers.rollouts import group, table

EACH = [(row,) for row in range(8)]


def test_packed_logprobs_equal_plain_forward_passes(tiny_model: Path):
    policy = make_policy(tiny_model, temperature=0.8)
    rollouts = Rollouts.from_table(a_table())
    (batch,) = micro_batches(rollouts, EACH, max_tokens=10_000, device="cpu")
    packed, entropy, _ = policy.logprobs(batch)

    oracle, expected, expected_entropy = plain_logprobs(tiny_model, policy, rollouts, temperature=0.8)
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=1e-5, rtol=1e-5)

    torch.cat(expected).square().sum().backward()
    packed.square().sum().backward()
    difference = (gradient_of(policy.lora) - gradient_of(oracle)).norm() / gradient_of(oracle).norm()
    assert difference < 1e-5


def make(folder: Path, *, micro_batch_tokens: int = 8192, kl: float = 0.0, checkpointing: bool = False) -> Learner:
    policy = make_policy(folder, checkpointing=checkpointing)
    return make_learner(policy, algorithm(kl_coefficient=kl), micro_batch_tokens=micro_batch_tokens)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_one_batch_of_eight_equals_micro_batches(tiny_model: Path, kl: float):
    gradients = []
    for tokens in (8192, 20, 1):
        learner = make(tiny_model, micro_batch_tokens=tokens, kl=kl)
        sums = learner.accumulate(a_table())
        gradients.append((gradient_of(learner.policy.lora), sums["loss"]))
    full_batch, loss = gradients[0]
    assert full_batch.abs().max() > 1e-3
    for gradient, other_loss in gradients[1:]:
        torch.testing.assert_close(gradient, full_batch, atol=1e-6, rtol=1e-6)
        assert other_loss == pytest.approx(loss, abs=1e-6)


def test_an_engines_copy_of_the_adapter_serves_the_learner(tiny_model: Path):
    own = make(tiny_model)
    layout = own.policy.lora.layout
    # As an engine has them: each matrix in a buffer of its own, here of a rank that is twice as large.
    slots = [
        torch.zeros(2 * e.shape[0], e.shape[1])[: e.shape[0]]
        if e.side == "A"
        else torch.zeros(e.shape[0], 2 * e.shape[1])[:, : e.shape[1]]
        for e in layout.entries
    ]
    policy = make_policy(tiny_model, adapter_slots=slots)
    learner = make_learner(policy, algorithm())
    for each in (own, learner):
        each.accumulate(a_table())
    torch.testing.assert_close(gradient_of(policy.lora), gradient_of(own.policy.lora), atol=1e-7, rtol=1e-6)
    for entry, slot in zip(layout.entries, slots, strict=True):
        scale = layout.scaling if entry.side == "B" else 1.0
        torch.testing.assert_close(slot, scale * entry.view(policy.lora.flat.detach()), atol=0, rtol=0)


def test_checkpointed_gradients_are_the_same(tiny_model: Path):
    plain, checkpointed = make(tiny_model), make(tiny_model, checkpointing=True)
    plain.accumulate(a_table())
    checkpointed.accumulate(a_table())
    torch.testing.assert_close(
        gradient_of(checkpointed.policy.lora), gradient_of(plain.policy.lora), atol=1e-6, rtol=1e-6
    )


def test_groups_without_variance_have_no_gradient(tiny_model: Path):
    learner = make(tiny_model)
    sums = learner.accumulate(table([group(0, [1.0, 1.0]), group(1, [0.0, 0.0])]))
    assert sums["rows"] == 0
    assert not gradient_of(learner.policy.lora).any()


def test_a_step_raises_the_probability_of_what_was_better(tiny_model: Path):
    learner = make(tiny_model)
    rows = table([group(0, [1.0, 0.0], completions=[[40, 41], [50, 51]])])
    (batch,) = micro_batches(Rollouts.from_table(rows), [(0,), (1,)], max_tokens=100, device="cpu")
    before = learner.policy.logprobs(batch)[0].detach()
    learner.step(rows)
    change = learner.policy.logprobs(batch)[0].detach() - before
    assert learner.version == 1
    assert change[:2].sum() > 0 > change[2:].sum()


def test_the_reference_is_the_base_model(tiny_model: Path):
    policy = make_policy(tiny_model)
    (batch,) = micro_batches(Rollouts.from_table(a_table()), EACH, max_tokens=100, device="cpu")
    with policy.reference():
        reference = policy.logprobs(batch)[0]
    with torch.no_grad():
        policy.lora.flat.zero_()
    torch.testing.assert_close(reference, policy.logprobs(batch)[0].detach())


def test_infinite_gradients_change_nothing(tiny_model: Path):
    learner = make(tiny_model)
    with torch.no_grad():
        learner.policy.lora.flat[0] = float("inf")
    before = learner.policy.lora.flat.detach().clone()
    with pytest.raises(Diverged, match=r"in step 1: the run has diverged.*learner\.learning_rate"):
        learner.step(a_table())
    assert torch.equal(learner.policy.lora.flat, before)


def test_nf4_base_learns(smollm2: str):
    """QLoRA through bitsandbytes' CPU path: the base is 4-bit, its log-probabilities are near, gradients flow."""
    full, quantized = make_policy(Path(smollm2)), make_policy(Path(smollm2), quantization="nf4")
    assert any(type(p).__name__ == "Params4bit" for p in quantized.lora.model.parameters())
    rows = table([group(0, [1.0, 0.0], prompt=list(range(100, 120)), completions=[[300, 301, 302], [400, 401]])])
    (batch,) = micro_batches(Rollouts.from_table(rows), [(0,), (1,)], max_tokens=100, device="cpu")
    for policy in (full, quantized):
        with torch.no_grad():
            policy.lora.flat.zero_()
            policy.lora.flat[: policy.lora.layout.start_of_b].fill_(0.01)
    with torch.no_grad():
        difference = (full.logprobs(batch)[0] - quantized.logprobs(batch)[0]).abs().mean()
    assert 0 < difference < 1.5
    learner = make_learner(quantized, algorithm(), learning_rate=1e-4)
    assert learner.step(rows).grad_norm > 0


def test_out_of_memory_halves_the_micro_batch_once_and_says_so(tiny_model: Path):
    learner, whole = make(tiny_model, micro_batch_tokens=26), make(tiny_model, micro_batch_tokens=13)
    stock, sizes = learner.policy.logprobs, []

    def logprobs(batch: MicroBatch, **options: bool) -> Tokens:
        sizes.append(len(batch.input_ids_S))
        if len(sizes) == 2:  # some of the gradient has been added by then
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(batch, **options)

    learner.policy.logprobs = logprobs
    with pytest.warns(UserWarning, match="with 13 tokens per micro-batch"):
        stats = learner.step(a_table())
    assert stats.grad_norm == pytest.approx(whole.step(a_table()).grad_norm, rel=1e-6)
    torch.testing.assert_close(learner.policy.lora.flat, whole.policy.lora.flat)
    before = learner.policy.lora.flat.detach().clone()
    sizes.clear()
    with pytest.raises(OutOfMemory, match=r"hardware\.vram_gib"):
        learner.step(a_table())
    torch.testing.assert_close(learner.policy.lora.flat, before, atol=0, rtol=0)
    assert learner.version == 1


def test_float16_gradients_are_scaled_and_overflow_is_survived(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    exact = make(tiny_model)
    exact.accumulate(a_table())
    unscaled = gradient_of(exact.policy.lora).norm().item()
    scaled = make_learner(make_policy(tiny_model, dtype="float16"), algorithm(), learning_rate=1e-4)
    scaled.accumulate(a_table())
    assert gradient_of(scaled.policy.lora).norm().item() == pytest.approx(FIRST_LOSS_SCALE * unscaled, rel=1e-2)
    assert FIRST_LOSS_SCALE > 1

    monkeypatch.setattr(learner_module, "FIRST_LOSS_SCALE", 2.0**40)  # overflows
    half = make_policy(tiny_model, dtype="float16")
    learner = make_learner(half, algorithm(), learning_rate=1e-4)
    learner.accumulate(a_table())
    assert not gradient_of(half.lora).isfinite().all()
    learner.step(a_table())
    exact.step(a_table())
    difference = (gradient_of(half.lora) - gradient_of(exact.policy.lora)).norm() / gradient_of(
        exact.policy.lora
    ).norm()
    assert difference < 1e-2
    # The scale has fallen for good.
    learner.accumulate(a_table())
    assert gradient_of(half.lora).isfinite().all()


def test_the_8_bit_optimizer_moves_as_the_plain_one_does(tiny_model: Path):
    moves = []
    for name in ("adamw", "adamw8bit"):
        learner = make_learner(make_policy(tiny_model), algorithm(), kind=name)
        before = learner.policy.lora.flat.detach().clone()
        for _ in range(3):
            learner.step(a_table())
        moves.append(learner.policy.lora.flat.detach() - before)
    assert ((moves[1] - moves[0]).norm() / moves[0].norm()) < 0.1


def test_micro_batches_are_even_and_lose_nothing():
    # 8 completions of 10 tokens on 4-token prompts: 2 x 4 + 8 x 9 = 80 tokens, which 70 does not hold.
    groups = [
        group(i, [1.0, 0.0] * 2, prompt=[2, 3, 4, 5], completions=[[7 + j] * 10 for j in range(4)]) for i in (0, 1)
    ]
    rollouts = Rollouts.from_table(table(groups))
    batches = list(micro_batches(rollouts, EACH, max_tokens=70, device="cpu"))
    assert [len(batch.input_ids_S) for batch in batches] == [40, 40]
    assert [sorted(set(batch.row_T.tolist())) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # Three parts cut through a group, whose prompt then comes twice.
    batches = list(micro_batches(rollouts, EACH, max_tokens=31, device="cpu"))
    assert [len(batch.input_ids_S) for batch in batches] == [4 + 27, 4 + 9 + 4 + 9, 4 + 27]
    assert [row for batch in batches for row in sorted(set(batch.row_T.tolist()))] == list(range(8))


def test_an_adapter_is_pickled_without_a_copy_of_its_weights():
    layout = AdapterLayout(8, 16.0, (AdapterEntry("m", "A", (8, 4000), 0), AdapterEntry("m", "B", (4000, 8), 32000)))
    adapter = Adapter(3, layout, torch.randn(layout.size))
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(adapter, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1000 and [b.raw().nbytes for b in buffers] == [4 * layout.size]
    back = pickle.loads(data, buffers=[bytes(b) for b in buffers])
    assert (back.version, back.layout) == (3, layout) and torch.equal(back.flat, adapter.flat)
