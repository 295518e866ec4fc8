"""Advantages, surrogates, KL and GRPO against values worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import AlgorithmSettings
from learner import aggregation, kl, surrogates
from learner.advantages import group_normalised
from learner.objectives import GRPO, TokenTerms

close = torch.testing.assert_close
NAN = float("nan")


def test_advantage_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 1, 3, 3], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    # The first group: mean 1/2, sample variance (4 * 1/4) / 3 = 1/3.
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    close(group_normalised(rewards, groups), torch.tensor([a, -a, -a, a, 0, 0], dtype=torch.float64))


def test_unscorable_completions_do_not_count():
    rewards = torch.tensor([2.0, NAN, 0.0], dtype=torch.float64)
    # mean 1 and sample variance (1 + 1) / 1 = 2 over the two that are scored.
    a = 1 / (math.sqrt(2) + 1e-4)
    close(group_normalised(rewards, torch.tensor([0, 0, 0])), torch.tensor([a, 0, -a], dtype=torch.float64))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16), st.floats(-1e3, 1e3))
def test_flat_groups_give_exactly_zero_and_all_others_are_finite(values: list[float], flat: float):
    rewards = torch.tensor([*values, *[flat] * 3], dtype=torch.float64)
    groups = torch.tensor([0] * len(values) + [1] * 3)
    found = group_normalised(rewards, groups)
    assert found.isfinite().all()
    assert found[len(values) :].tolist() == [0, 0, 0]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=8), st.sampled_from([-2.0, 0.5, 8.0]))
def test_a_constant_added_to_a_group_changes_nothing(values: list[float], constant: float):
    rewards = torch.tensor(values, dtype=torch.float64)
    groups = torch.zeros(len(values), dtype=torch.long)
    close(group_normalised(rewards + constant, groups), group_normalised(rewards, groups))


def test_token_clip_by_hand():
    policy = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64))
    old = torch.zeros(5, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1, 1, -1, 2], dtype=torch.float64)
    expected = torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2], dtype=torch.float64)
    close(surrogates.token_clip(policy, old, advantages, low=0.2, high=0.2), expected)


def test_truncated_importance_by_hand():
    old = torch.log(torch.tensor([0.5, 3.0], dtype=torch.float64))
    behavior = torch.log(torch.tensor([1.0, 1.0], dtype=torch.float64))
    close(surrogates.truncated_importance(old, behavior, cap=2), torch.tensor([0.5, 2.0], dtype=torch.float64))


def test_k3_by_hand():
    policy, reference = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(2)])
    close(kl.k3(policy, reference), torch.tensor([0.0, 1 - math.log(2)]))


def test_per_sequence_weights_by_hand():
    lengths, used = torch.tensor([1, 4, 2]), torch.tensor([True, True, False])
    close(aggregation.per_sequence(lengths, used), torch.tensor([1 / 2, 1 / 8, 0]))


def test_grpo_loss_and_gradient_by_hand():
    objective = GRPO(AlgorithmSettings(kl_coefficient=0.1, importance_cap=2.0))
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    # Behavior: the first token was sampled with 1/4 of the policy's probability (weight 4, capped at 2), the second
    # with twice the policy's (weight 1/2), the third with the policy's own (weight 1).
    behavior = policy.detach() - torch.log(torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64))
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    reference = policy.detach() + math.log(2)
    loss = objective.loss(TokenTerms(advantages, weights, behavior), policy, reference)
    loss.backward()
    penalty = 1 - math.log(2)  # k3 with d = log 2
    surrogate = 0.25 * 2 * -1 + 0.25 * 0.5 * -1 + 0.5 * 1 * 1
    assert loss.item() == pytest.approx(surrogate + 0.1 * penalty, abs=1e-12)
    # d/dpolicy: -weight * importance * A for the surrogate at ratio 1, and weight * beta * (1 - e^d) = -beta * weight.
    expected = [0.25 * (-2 - 0.1), 0.25 * (-0.5 - 0.1), 0.5 * (1 - 0.1)]
    close(policy.grad, torch.tensor(expected, dtype=torch.float64))


def test_grpo_prepares_from_the_whole_batch():
    objective = GRPO(AlgorithmSettings())
    prepared = objective.prepare(torch.tensor([1.0, 0.0, NAN]), torch.tensor([0, 0, 0]), torch.tensor([2, 1, 5]))
    close(prepared.token_weights_N, torch.tensor([1 / 4, 1 / 2, 0]))
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(prepared.advantages_N, torch.tensor([a, -a, 0]))
