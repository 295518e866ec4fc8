"""Truncated sampling by hand, and the learner's log-probabilities under it."""

from pathlib import Path

import pytest
import torch

from actors.models.source import ModelSource
from actors.models.truncation import truncate_in_place
from actors.rollout import RolloutWorker
from actors.types import Prompt, Sampling, Truncation
from benchmarks.common import sample_groups
from benchmarks.family_models import make_family_model
from benchmarks.model_subject import engine_options, make_subject
from benchmarks.models import rollouts_of
from learner.minibatches import micro_batches
from learner.model.logprobs import token_logprobs

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]


@pytest.mark.parametrize(
    ("truncation", "left"),
    [
        (Truncation(), [0, 1, 2, 3, 4]),
        (Truncation(top_k=2), [0, 1]),
        (Truncation(top_k=9), [0, 1, 2, 3, 4]),
        (Truncation(top_p=0.75), [0, 1, 2]),  # 0.4 + 0.3 is less
        (Truncation(top_p=0.3), [0]),
        (Truncation(min_p=0.3), [0, 1, 2]),  # at least 0.12
        (Truncation(top_k=3, top_p=0.8), [0, 1]),  # of 0.85 they have 0.82
    ],
)
def test_what_is_left(truncation: Truncation, left: list[int]):
    logits = torch.tensor([PROBABILITIES]).log()
    truncate_in_place(logits, truncation, temperature=1.0)
    assert logits.softmax(1).nonzero()[:, 1].tolist() == left
    total = sum(PROBABILITIES[i] for i in left)
    torch.testing.assert_close(logits.softmax(1)[0, left], torch.tensor(PROBABILITIES)[left] / total)


def test_a_temperature_comes_first():
    """At temperature 1/2 the probabilities are as 0.16, 0.09, 0.0225, ...: the first two have 0.87 of them."""
    logits = torch.tensor([PROBABILITIES]).log()
    truncate_in_place(logits, Truncation(top_p=0.8), temperature=0.5)
    assert logits.softmax(1).nonzero()[:, 1].tolist() == [0, 1]


def test_a_target_stays():
    logits = torch.tensor([PROBABILITIES]).log()
    truncate_in_place(logits, Truncation(top_k=1), temperature=1.0, targets_T=torch.tensor([4]))
    assert logits.softmax(1).nonzero()[:, 1].tolist() == [0, 4]


@pytest.mark.parametrize("truncation", [Truncation(top_k=3), Truncation(top_p=0.7), Truncation(min_p=0.2)])
def test_gradients_are_those_of_the_truncated_distribution(truncation: Truncation):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 5, generator=draw, dtype=torch.float64).float().requires_grad_()
    head, targets = torch.randn(11, 5, generator=draw), torch.randint(11, (40,), generator=draw)
    full = hidden @ head.T
    kept = truncate_in_place(full.detach().clone(), truncation, temperature=0.7, targets_T=targets)
    expected = full.masked_fill(kept < -1e3, float("-inf")).div(0.7).log_softmax(1)[range(40), targets]
    logprobs, _ = token_logprobs(hidden, head, targets, temperature=0.7, chunk=16, truncation=truncation)
    torch.testing.assert_close(logprobs, expected)
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), hidden)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_engine_and_learner_truncate_alike(engine: str, tmp_path: Path):
    truncation = Truncation(top_k=12, top_p=0.8, min_p=0.02)
    source = ModelSource(str(make_family_model("llama", tmp_path)), None, "")
    subject = make_subject(
        source, engine_options(source.path, answer_tokens=24), engine_name=engine, truncation=truncation
    )
    try:
        worker = RolloutWorker(subject.engine, seed=1)
        prompts = [Prompt(i, "", (5 + i, 6, 7), "", None, "") for i in range(2)]
        rollouts = rollouts_of(sample_groups(worker, prompts, Sampling(1.0, 24, truncation=truncation), 4))
    finally:
        subject.engine.close()
    (batch,) = micro_batches(rollouts, [(i,) for i in range(8)], max_tokens=10_000, device="cpu")
    with torch.no_grad():
        logprobs = subject.policy.logprobs(batch).logprobs_T
        subject.policy._truncation = Truncation()
        of_all_tokens = subject.policy.logprobs(batch).logprobs_T
    difference = (logprobs - batch.behavior_logprobs_T).abs()
    assert difference.median() < 1e-4
    assert (difference < 1e-3).float().mean() > 0.98  # rounding decides about a token at the edge
    assert (logprobs - of_all_tokens).min() > 0.1
