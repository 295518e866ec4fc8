"""What holds for every algorithm, whatever the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives import OBJECTIVES, RECIPES
from learner.terms import Scored, Survey, TokenTerms
from tests.presets import objective
from tests.unit.test_objectives import f64, scored

close = torch.testing.assert_close
NAN = float("nan")
GROUPWISE = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")

ANY = st.floats(-1e6, 1e6)
LOG = st.floats(-60, 0)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Scored, dict[str, torch.Tensor]]:
    """Up to three groups of up to four completions of up to three tokens, some without a reward, log-probabilities of any
    size."""
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
    return scored(rewards, groups, lengths), logprobs


def loss_and_gradient(
    name: str, batch: Scored, logprobs: dict[str, torch.Tensor], **changed: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """With the preset's own settings."""
    one = objective(name, max_tokens=4, **changed)
    values = torch.zeros(len(logprobs["old"])) if one.has_critic else None
    prepared = one.prepare(batch, Survey(logprobs["old"], logprobs["reference"], values))
    rows = batch.per_token(torch.arange(len(batch.rewards_N)))
    policy = logprobs["policy"].clone().requires_grad_()
    order = [t for unit in prepared.units for row in unit for t in (rows == row).nonzero()[:, 0].tolist()]
    if not order:
        return torch.zeros(()), torch.zeros_like(policy)
    reference = logprobs["reference"][order] if one.needs_reference else None
    weights = one.weights(batch, prepared.used_N)[rows[order]]
    advantages_T = prepared.advantages_A[order].float()
    terms = TokenTerms(
        rows[order], advantages_T, weights, logprobs["behavior"][order], logprobs["old"][order], reference
    )
    loss = one.loss(terms, policy[order])
    loss.backward()
    return loss.detach(), policy.grad


@given(data=st.data())
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_finite_gives_nan(name: str, data: st.DataObject):
    loss, gradient = loss_and_gradient(name, *data.draw(batches()))
    assert loss.isfinite() and gradient.isfinite().all()


@given(data=st.data(), constant=st.sampled_from([-2.0, 0.5, 8.0]))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_constant_on_every_reward_changes_nothing(name: str, data: st.DataObject, constant: float):
    """For REINFORCE++ on all of the batch, for the others group by group. PPO's values would have to learn it."""
    if name == "ppo":
        return
    batch, logprobs = data.draw(batches())
    rewards = torch.where(batch.rewards_N.isfinite(), batch.rewards_N.clamp(0, 1).round(), NAN)
    moved = rewards + (constant * (1 + batch.groups_N) if name in (*GROUPWISE, "online_dpo") else constant)
    one = loss_and_gradient(name, scored(rewards, batch.groups_N, batch.lengths_N), logprobs)
    other = loss_and_gradient(name, scored(moved, batch.groups_N, batch.lengths_N), logprobs)
    close(one, other, rtol=1e-4, atol=1e-4)


@given(data=st.data(), reward=ANY)
@pytest.mark.parametrize("name", [*GROUPWISE, "online_dpo"])
def test_flat_groups_have_no_gradient(name: str, data: st.DataObject, reward: float):
    batch, logprobs = data.draw(batches())
    flat = torch.where(batch.rewards_N.isfinite(), reward, NAN).to(torch.float64)
    changed = {"kl_coefficient": 0.0} if name in RECIPES else {}
    _, gradient = loss_and_gradient(name, scored(flat, batch.groups_N, batch.lengths_N), logprobs, **changed)
    assert not gradient.any()


@given(data=st.data(), seed=st.integers(0, 1000))
@pytest.mark.parametrize("name", OBJECTIVES)
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
    one = loss_and_gradient(name, scored(rewards, batch.groups_N, batch.lengths_N), logprobs)
    moved = {key: value[tokens] for key, value in logprobs.items()}
    other = loss_and_gradient(name, scored(rewards[order], batch.groups_N, batch.lengths_N[order]), moved)
    close(other[0], one[0], rtol=1e-3, atol=1e-3)
    close(other[1], one[1][tokens], rtol=1e-3, atol=1e-3)
