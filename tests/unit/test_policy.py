"""The packed, prefix-shared policy against plain forward passes, and the learner's micro-batches."""

import pickle
from pathlib import Path

import pytest
import torch

from actors.engine import Diverged
from actors.lora import FlatLora
from actors.models import ModelSource, load_base_model
from actors.types import Adapter, AdapterEntry, AdapterLayout
from conf.schema import LearnerSettings
from learner.attention import NAME
from learner.batch import MicroBatch, Rollouts, micro_batches
from learner.learner import Learner, OutOfMemory
from learner.policy import Policy, Tokens
from tests.presets import objective
from tests.rollouts import group, table

EACH = [(row,) for row in range(8)]
LORA = {
    "rank": 4,
    "alpha": 8.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_policy(
    folder: Path,
    *,
    temperature: float = 1.0,
    checkpointing: bool = False,
    quantization: str = "none",
    dtype: str = "float32",
) -> Policy:
    source = ModelSource(str(folder), None, "test")
    model = load_base_model(
        source, dtype=dtype, device="cpu", quantization=quantization, trust_remote_code=False, attention=NAME
    )
    policy = Policy(
        model, lora=LORA, seed=0, temperature=temperature, logit_chunk_tokens=5, gradient_checkpointing=checkpointing
    )
    randomise(policy.lora)
    return policy


def randomise(lora: FlatLora) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        lora.flat.add_(0.05 * torch.randn(lora.flat.shape, generator=generator))


def a_table():
    draw = torch.Generator().manual_seed(2)

    def tokens(n: int) -> list[int]:
        return torch.randint(2, 250, (n,), generator=draw).tolist()

    groups = []
    for ordinal, (prompt, sizes) in enumerate([(9, [1, 4, 7, 2]), (3, [5, 5, 1, 6])]):
        completions = [tokens(n) for n in sizes]
        groups.append(group(ordinal, [1.0, 0.0, 0.5, 0.25], prompt=tokens(prompt), completions=completions))
    return table(groups)


def test_packed_logprobs_equal_plain_forward_passes(tiny_model: Path):
    policy = make_policy(tiny_model, temperature=0.8)
    rollouts = Rollouts.from_table(a_table())
    (batch,) = micro_batches(rollouts, EACH, max_tokens=10_000, device="cpu")
    found, entropy, _ = policy.logprobs(batch)

    plain = load_base_model(
        ModelSource(str(tiny_model), None, ""),
        dtype="float32",
        device="cpu",
        quantization="none",
        trust_remote_code=False,
    )
    oracle = FlatLora(plain, **LORA, seed=0)
    oracle.load(policy.lora.export(0))
    expected, expected_entropy = [], []
    for tokens, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
        logits = oracle.model(input_ids=torch.tensor(tokens[None], dtype=torch.long)).logits[0] / 0.8
        logprobs = logits.log_softmax(-1)[start - 1 : -1]
        expected.append(logprobs[range(len(tokens) - start), torch.tensor(tokens[start:], dtype=torch.long)])
        expected_entropy.append(-(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat(expected_entropy), atol=1e-5, rtol=1e-5)

    torch.cat(expected).square().sum().backward()
    found.square().sum().backward()
    difference = (policy.lora.flat.grad - oracle.flat.grad).norm() / oracle.flat.grad.norm()
    assert difference < 1e-5


def learner(folder: Path, *, micro_batch_tokens: int = 8192, kl: float = 0.0, **options) -> Learner:
    settings = LearnerSettings(learning_rate=1e-3, micro_batch_tokens=micro_batch_tokens)
    return Learner(make_policy(folder, **options), objective(kl_coefficient=kl), settings)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_one_batch_of_eight_equals_micro_batches(tiny_model: Path, kl: float):
    gradients = []
    for tokens in (8192, 20, 1):
        one = learner(tiny_model, micro_batch_tokens=tokens, kl=kl)
        sums = one.accumulate(a_table())
        gradients.append((one.policy.lora.flat.grad, sums["loss"].item()))
    whole, loss = gradients[0]
    assert whole.abs().max() > 1e-3
    for gradient, other_loss in gradients[1:]:
        torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-6)
        assert other_loss == pytest.approx(loss, abs=1e-6)


def test_checkpointed_gradients_are_the_same(tiny_model: Path):
    plain, checkpointed = learner(tiny_model), learner(tiny_model, checkpointing=True)
    plain.accumulate(a_table())
    checkpointed.accumulate(a_table())
    torch.testing.assert_close(checkpointed.policy.lora.flat.grad, plain.policy.lora.flat.grad, atol=1e-6, rtol=1e-6)


def test_flat_groups_have_no_gradient(tiny_model: Path):
    one = learner(tiny_model)
    sums = one.accumulate(table([group(0, [1.0, 1.0]), group(1, [0.0, 0.0])]))
    assert sums["rows"] == 0
    assert not one.policy.lora.flat.grad.any()


def test_a_step_raises_the_probability_of_what_was_better(tiny_model: Path):
    one = learner(tiny_model)
    rows = table([group(0, [1.0, 0.0], completions=[[40, 41], [50, 51]])])
    (batch,) = micro_batches(Rollouts.from_table(rows), [(0,), (1,)], max_tokens=100, device="cpu")
    before = one.policy.logprobs(batch)[0].detach()
    one.step(rows)
    change = one.policy.logprobs(batch)[0].detach() - before
    assert one.version == 1
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
    one = learner(tiny_model)
    with torch.no_grad():
        one.policy.lora.flat[0] = float("inf")
    before = one.policy.lora.flat.detach().clone()
    with pytest.raises(Diverged, match=r"in step 1: the run has diverged.*learner\.learning_rate"):
        one.step(a_table())
    assert torch.equal(one.policy.lora.flat, before)


def test_nf4_base_learns(smollm2: str):
    """QLoRA through bitsandbytes' CPU path: the base is 4-bit, its log-probabilities are near, gradients flow."""
    full, quantised = make_policy(Path(smollm2)), make_policy(Path(smollm2), quantization="nf4")
    assert any(type(p).__name__ == "Params4bit" for p in quantised.lora.model.parameters())
    rows = table([group(0, [1.0, 0.0], prompt=list(range(100, 120)), completions=[[300, 301, 302], [400, 401]])])
    (batch,) = micro_batches(Rollouts.from_table(rows), [(0,), (1,)], max_tokens=100, device="cpu")
    for policy in (full, quantised):
        with torch.no_grad():
            policy.lora.flat.zero_()
            policy.lora.flat[: policy.lora.layout.start_of_b].fill_(0.01)
    with torch.no_grad():
        difference = (full.logprobs(batch)[0] - quantised.logprobs(batch)[0]).abs().mean()
    assert 0 < difference < 1.5
    one = Learner(quantised, objective(), LearnerSettings())
    assert one.step(rows).grad_norm > 0


def test_out_of_memory_halves_the_micro_batch_once_and_says_so(tiny_model: Path):
    one, whole = learner(tiny_model, micro_batch_tokens=26), learner(tiny_model, micro_batch_tokens=13)
    stock, sizes = one.policy.logprobs, []

    def logprobs(batch: MicroBatch, **options: bool) -> Tokens:
        sizes.append(len(batch.input_ids_S))
        if len(sizes) == 2:  # some of the gradient has been added by then
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(batch, **options)

    one.policy.logprobs = logprobs
    with pytest.warns(UserWarning, match="with 13 tokens a micro-batch"):
        stats = one.step(a_table())
    assert stats.grad_norm == pytest.approx(whole.step(a_table()).grad_norm, rel=1e-6)
    torch.testing.assert_close(one.policy.lora.flat, whole.policy.lora.flat)
    before = one.policy.lora.flat.detach().clone()
    sizes.clear()
    with pytest.raises(OutOfMemory, match=r"hardware\.vram_gib"):
        one.step(a_table())
    torch.testing.assert_close(one.policy.lora.flat, before, atol=0, rtol=0)
    assert one.version == 1


def test_float16_gradients_are_scaled_and_overflow_is_survived(tiny_model: Path):
    half = make_policy(tiny_model, dtype="float16")
    one = Learner(half, objective(), LearnerSettings())
    assert one._loss_scale > 1
    one._loss_scale = 2.0**40  # overflows
    one.step(a_table())
    assert one._loss_scale < 2.0**40
    exact = learner(tiny_model)
    exact.step(a_table())
    difference = (half.lora.flat.grad - exact.policy.lora.flat.grad).norm() / exact.policy.lora.flat.grad.norm()
    assert difference < 1e-2


def test_the_8_bit_optimizer_moves_as_the_plain_one_does(tiny_model: Path):
    moves = []
    for name in ("adamw", "adamw8bit"):
        settings = LearnerSettings(learning_rate=1e-3, optimizer=name)
        one = Learner(make_policy(tiny_model), objective(), settings)
        before = one.policy.lora.flat.detach().clone()
        for _ in range(3):
            one.step(a_table())
        moves.append(one.policy.lora.flat.detach() - before)
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
