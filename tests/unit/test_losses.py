"""Advantages, surrogates, weights, KL and preference losses against values worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.losses import advantages, aggregation, kl, preferences, surrogates
from learner.losses.advantages import group_relative
from rewards.variance import is_zero_variance
from tests.helpers.rewarded import f64

close = torch.testing.assert_close
NAN = float("nan")


def test_advantage_by_hand():
    rewards = torch.tensor([1.0, 0, 0, 1, 3, 3], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    # The first group: mean 1/2, sample variance (4 * 1/4) / 3 = 1/3.
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    close(group_relative(rewards, groups), torch.tensor([a, -a, -a, a, 0, 0], dtype=torch.float64))


def test_other_scales_of_advantages_by_hand():
    rewards, groups = f64(1, 0, 5, 3), torch.tensor([0, 0, 1, 1])
    close(group_relative(rewards, groups, scale="none"), f64(0.5, -0.5, 1, -1))
    # All four: mean 9/4, sample variance (25 + 81 + 121 + 9) / 16 / 3 = 59/12.
    std = math.sqrt(59 / 12) + 1e-4
    close(group_relative(rewards, groups, scale="batch"), f64(0.5, -0.5, 1, -1) / std)


def test_leave_one_out_by_hand():
    rewards, groups = f64(1, 0, NAN, 2, 7, NAN), torch.tensor([0, 0, 0, 0, 1, 1])
    # 1 - (0 + 2) / 2, 0 - (1 + 2) / 2, none, 2 - (1 + 0) / 2; and a completion that is alone.
    close(advantages.leave_one_out(rewards, groups), f64(0, -1.5, 0, 1.5, 0, 0))


def test_terms_normalized_one_by_one_by_hand():
    terms = {"right": f64(1, 0, 0, 0), "short": f64(0, 10, NAN, NAN)}
    normalized = advantages.terms_normalized(terms, {"right": 2.0}, torch.tensor([0, 0, 1, 1]))
    # In the first group 2 * (0.5, -0.5) / s and (-5, 5) / (10 s), s = sqrt(1/2) up to epsilon; nothing in the second.
    right, short = 0.5 / (math.sqrt(0.5) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
    sums = f64(2 * right - short, short - 2 * right, 0, 0)
    close(normalized, sums / (sums.std() + 1e-4))


def test_batch_normalized_by_hand():
    normalized = advantages.batch_normalized(f64(1, 3, 100), torch.tensor([True, True, False]))
    close(normalized, f64(-1, 1, 0) / (math.sqrt(2) + 1e-4))
    close(advantages.batch_normalized(f64(0.1, 0.1), torch.tensor([True, True])), f64(0, 0))


def test_gae_by_hand():
    lengths = torch.tensor([3, 1])
    rewards, values = f64(0, 0, 1, 2), f64(0.5, 0.25, 0.5, 1)
    estimates = advantages.gae(rewards, values, lengths, gamma=0.5, gae_lambda=0.5)
    # d = (0.5 * 0.25 - 0.5, 0.5 * 0.5 - 0.25, 1 - 0.5), A_3 = 0.5, A_2 = 0 + 0.25 * 0.5, A_1 = -0.375 + 0.25 * 0.125.
    close(estimates, f64(-0.34375, 0.125, 0.5, 1))
    close(advantages.reward_to_go(f64(1, 2, 3, 4), lengths), f64(6, 5, 3, 4))


def test_overlong_penalty_by_hand():
    penalties = advantages.overlong_penalty(torch.tensor([5, 80, 90, 100]), max_tokens=100, buffer=20)
    close(penalties, f64(0, 0, -0.5, -1))


def test_unscorable_completions_do_not_count():
    rewards = torch.tensor([2.0, NAN, 0.0], dtype=torch.float64)
    # mean 1 and sample variance (1 + 1) / 1 = 2 over the two that are scored.
    a = 1 / (math.sqrt(2) + 1e-4)
    close(group_relative(rewards, torch.tensor([0, 0, 0])), torch.tensor([a, 0, -a], dtype=torch.float64))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16), st.floats(-1e3, 1e3))
def test_groups_without_variance_give_exactly_zero_and_all_others_are_finite(values: list[float], constant: float):
    rewards = torch.tensor([*values, *[constant] * 3], dtype=torch.float64)
    groups = torch.tensor([0] * len(values) + [1] * 3)
    relative = group_relative(rewards, groups)
    assert relative.isfinite().all()
    assert relative[len(values) :].tolist() == [0, 0, 0]


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=8), st.sampled_from([-2.0, 0.5, 8.0]))
def test_a_constant_added_to_a_group_changes_nothing(values: list[float], constant: float):
    rewards = torch.tensor(values, dtype=torch.float64)
    groups = torch.zeros(len(values), dtype=torch.long)
    close(group_relative(rewards + constant, groups), group_relative(rewards, groups))


def test_token_clip_by_hand():
    policy = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64))
    old = torch.zeros(5, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1, 1, -1, 2], dtype=torch.float64)
    expected = torch.tensor([-1.2, 1.5, -0.5, 0.8, -2.2], dtype=torch.float64)
    close(surrogates.token_clip(policy, old, advantages, low=0.2, high=0.2), expected)
    # At most 1.3 in the first term: it bounds the loss of a negative advantage.
    expected[1] = 1.3
    close(surrogates.token_clip(policy, old, advantages, low=0.2, high=0.2, dual_clip=1.3), expected)


def test_sequence_clip_by_hand():
    rows = torch.tensor([3, 3, 7])
    policy = torch.log(f64(4, 1, 1.1))  # geometric means 2 and 1.1
    old = torch.zeros(3, dtype=torch.float64)
    losses = surrogates.sequence_clip(policy, old, f64(1, 1, 2), rows, low=0.2, high=0.2)
    close(losses, f64(-1.2, -1.2, -2.2))


def test_clipped_weight_by_hand():
    policy = torch.log(f64(3, 0.5)).requires_grad_()
    loss = surrogates.clipped_weight(policy, torch.zeros(2, dtype=torch.float64), f64(2, -1), low=0.2, high=1.0)
    close(loss.detach(), f64(-2 * 2 * math.log(3), 0.8 * math.log(0.5)))
    loss.sum().backward()
    close(policy.grad, f64(-4, 0.8))


def test_importance_weights_by_hand():
    old, behavior, rows = torch.log(f64(0.5, 3, 3)), torch.zeros(3, dtype=torch.float64), torch.tensor([0, 0, 1])
    close(surrogates.importance_weights(old, behavior, rows, cap=2), f64(0.5, 2, 2))
    close(surrogates.importance_weights(old, behavior, rows, cap=2, mode="mask"), f64(0.5, 0, 0))
    close(surrogates.importance_weights(old, behavior, rows, cap=2, level="sequence"), f64(1.5, 1.5, 2))
    close(surrogates.importance_weights(old, behavior, rows, cap=2, level="sequence", mode="mask"), f64(1.5, 1.5, 0))


def test_value_loss_by_hand():
    values, old, returns = f64(1.0, 1.0), f64(0.5, 0.5), f64(0.0, 2.0)
    close(surrogates.value_loss(values, old, returns, clip=None), f64(0.5, 0.5))
    # Clipped to 0.7: (0.7 - 0)^2 is the smaller, (0.7 - 2)^2 the larger.
    close(surrogates.value_loss(values, old, returns, clip=0.2), f64(0.5, 1.69 / 2))


def test_preferences_by_hand():
    margins = f64(0.0, 20.0)
    close(preferences.sigmoid(margins, beta=0.1), f64(math.log(2), math.log(1 + math.exp(-2))))
    close(preferences.ipo(margins, beta=0.1), f64(25, 225))
    close(preferences.hinge(margins, beta=0.1), f64(1, 0))


def test_pairs_and_ties():
    rewards, groups = f64(0, 1, 1, NAN, 2, 2, NAN, 3), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    assert preferences.best_and_worst(rewards, groups) == ([(1, 0)], 2)
    equal = torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64)  # they differ by rounding alone
    assert preferences.best_and_worst(equal, torch.tensor([0, 0])) == ([], 1)


def test_k3_by_hand():
    policy, reference = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(2)])
    close(kl.k3(policy, reference), torch.tensor([0.0, 1 - math.log(2)]))
    close(kl.k1(policy, reference), torch.tensor([0.0, -math.log(2)]))
    close(kl.k2(policy, reference), torch.tensor([0.0, math.log(2) ** 2 / 2]))


def test_the_weight_of_kl_follows_its_target():
    assert kl.adapt_coefficient(0.1, measured=0.11, target=0.1) == pytest.approx(0.101)
    assert kl.adapt_coefficient(0.1, measured=5.0, target=0.1) == pytest.approx(0.102)
    assert kl.adapt_coefficient(0.1, measured=0.0, target=0.1) == pytest.approx(0.098)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequence_mean", [1 / 2, 1 / 8, 0]),
        ("token_mean", [1 / 5, 1 / 5, 0]),
        ("constant_length", [1 / 16, 1 / 16, 0]),
        ("sequence_sum", [1 / 2, 1 / 2, 0]),
    ],
)
def test_weights_by_hand(name: str, expected: list[float]):
    lengths, counted = torch.tensor([1, 4, 2]), torch.tensor([True, True, False])
    close(aggregation.AGGREGATIONS[name](lengths, counted, 8), torch.tensor(expected))


@given(
    st.lists(st.sampled_from([0.0, 0.1 + 0.2, 0.3, 0.3 + 1e-12, 0.31, -0.3, 1e6, 1e6 + 1e-4]), min_size=2, max_size=4),
    st.lists(st.sampled_from([0.3, 1.0]), min_size=2, max_size=3),
)
def test_the_learner_the_replay_and_the_metrics_agree_on_zero_variance(first: list[float], second: list[float]):
    rewards = torch.tensor([*first, *second], dtype=torch.float64)
    groups = torch.tensor([0] * len(first) + [1] * len(second))
    expected = torch.tensor([is_zero_variance(first)] * len(first) + [is_zero_variance(second)] * len(second))
    assert torch.equal(advantages.zero_variance_groups(rewards, groups), expected)
    assert not group_relative(rewards, groups)[expected].any()
