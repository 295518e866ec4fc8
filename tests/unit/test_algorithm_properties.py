"""What holds for every algorithm, whatever the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.base import LossInputs, OldLogprobs
from learner.algorithms.table import ALGORITHMS, RECIPES
from learner.batch import RewardedBatch
from tests.helpers.presets import algorithm
from tests.helpers.rewarded import f64, rewarded_batch

close = torch.testing.assert_close
NAN = float("nan")
GROUPWISE = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")

# The first example of an algorithm also reads its preset.
no_deadline = settings(deadline=None)

ANY = st.floats(-1e6, 1e6)
LOG = st.floats(-60, 0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[RewardedBatch, dict[str, torch.Tensor]]:
    """Up to three groups of up to four completions of up to three tokens.

    Some have no reward; log-probabilities are of any size.
    """
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    count = len(groups)
    few = st.sampled_from([0.0, 1.0, NAN])
    rewards = f64(*draw(st.lists(st.one_of(ANY, few), min_size=count, max_size=count)))
    lengths = torch.tensor(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    tokens = int(lengths.sum())
    logprobs = {
        name: torch.tensor(draw(st.lists(LOG, min_size=tokens, max_size=tokens)))
        for name in ("policy", "old", "behavior", "reference")
    }
    return rewarded_batch(rewards, groups, lengths), logprobs


def loss_and_gradient(
    name: str, batch: RewardedBatch, logprobs: dict[str, torch.Tensor], **changed: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """With the preset's own settings."""
    learned = algorithm(name, max_tokens=4, **changed)
    values = torch.zeros(len(logprobs["old"])) if learned.has_critic else None
    prepared = learned.prepare(batch, OldLogprobs(logprobs["old"], logprobs["reference"], values))
    rows = batch.per_token(torch.arange(len(batch.rewards_N)))
    policy = logprobs["policy"].clone().requires_grad_()
    order = [t for unit in prepared.pack_units for row in unit for t in (rows == row).nonzero()[:, 0].tolist()]
    if not order:
        return torch.zeros(()), torch.zeros_like(policy)
    inputs = LossInputs(
        rows_T=rows[order],
        advantages_T=prepared.advantages_A[order].float(),
        weights_T=learned.weights(batch, prepared.counted_N)[rows[order]],
        behavior_logprobs_T=logprobs["behavior"][order],
        policy_logprobs_T=policy[order],
        old_logprobs_T=logprobs["old"][order],
        reference_logprobs_T=logprobs["reference"][order] if learned.reference_in_loss else None,
    )
    loss = learned.loss(inputs)
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad


@no_deadline
@given(data=st.data())
@pytest.mark.parametrize("name", ALGORITHMS)
def test_nothing_finite_gives_nan(name: str, data: st.DataObject):
    loss, gradient = loss_and_gradient(name, *data.draw(batches()))
    assert loss.isfinite() and gradient.isfinite().all()


@no_deadline
@given(data=st.data(), constant=st.sampled_from([-2.0, 0.5, 8.0]))
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "ppo"])
def test_a_constant_on_every_reward_changes_nothing(name: str, data: st.DataObject, constant: float):
    """For REINFORCE++ on all of the batch, for the others group by group. PPO's values would have to learn it."""
    batch, logprobs = data.draw(batches())
    rewards = torch.where(batch.rewards_N.isfinite(), batch.rewards_N.clamp(0, 1).round(), NAN)
    moved = rewards + (constant * (1 + batch.groups_N) if name in (*GROUPWISE, "online_dpo") else constant)
    before = loss_and_gradient(name, rewarded_batch(rewards, batch.groups_N, batch.lengths_N), logprobs)
    after = loss_and_gradient(name, rewarded_batch(moved, batch.groups_N, batch.lengths_N), logprobs)
    close(before, after, rtol=1e-4, atol=1e-4)


@no_deadline
@given(data=st.data(), reward=ANY)
@pytest.mark.parametrize("name", [*GROUPWISE, "online_dpo"])
def test_groups_without_variance_have_no_gradient(name: str, data: st.DataObject, reward: float):
    batch, logprobs = data.draw(batches())
    equal = torch.where(batch.rewards_N.isfinite(), reward, NAN).to(torch.float64)
    changed = {"kl_coefficient": 0.0} if name in RECIPES else {}
    _, gradient = loss_and_gradient(name, rewarded_batch(equal, batch.groups_N, batch.lengths_N), logprobs, **changed)
    assert not gradient.any()


@no_deadline
@given(data=st.data(), seed=st.integers(0, 1000))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_samples_does_not_matter(name: str, data: st.DataObject, seed: int):
    batch, logprobs = data.draw(batches())
    rewards = torch.where(batch.rewards_N.isfinite(), batch.rewards_N.clamp(0, 3), NAN)
    # Of equal rewards, pairs take the first: make them different.
    rewards = rewards + 0.01 * torch.arange(len(rewards))
    draw = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [
            g[torch.randperm(len(g), generator=draw)]
            for g in torch.arange(len(rewards)).split(batch.groups_N.bincount().tolist())
        ]
    )
    spans = list(torch.arange(int(batch.lengths_N.sum())).split(batch.lengths_N.tolist()))
    tokens = torch.cat([spans[i] for i in order])
    before = loss_and_gradient(name, rewarded_batch(rewards, batch.groups_N, batch.lengths_N), logprobs)
    moved = {key: value[tokens] for key, value in logprobs.items()}
    after = loss_and_gradient(name, rewarded_batch(rewards[order], batch.groups_N, batch.lengths_N[order]), moved)
    close(after[0], before[0], rtol=1e-3, atol=1e-3)
    close(after[1], before[1][tokens], rtol=1e-3, atol=1e-3)
