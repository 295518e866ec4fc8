"""Advantages, surrogates, weights, KL and losses against values worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import AlgorithmSettings
from learner import advantages, aggregation, kl, preferences, surrogates
from learner.advantages import group_relative
from learner.objectives import OBJECTIVES
from learner.terms import Scored, Survey, TokenTerms
from rewards.variance import is_zero_variance

close = torch.testing.assert_close
NAN = float("nan")
GROUPWISE = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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
    # 1 - (0 + 2) / 2, 0 - (1 + 2) / 2, none, 2 - (1 + 0) / 2; and one that is alone.
    close(advantages.leave_one_out(rewards, groups), f64(0, -1.5, 0, 1.5, 0, 0))


def test_terms_normalised_one_by_one_by_hand():
    terms = {"right": f64(1, 0, 0, 0), "short": f64(0, 10, NAN, NAN)}
    found = advantages.terms_normalised(terms, {"right": 2.0}, torch.tensor([0, 0, 1, 1]))
    # In the first group 2 * (0.5, -0.5) / s and (-5, 5) / (10 s), with s = sqrt(1/2) up to epsilon; nothing in the second.
    one, two = 0.5 / (math.sqrt(0.5) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
    sums = f64(2 * one - two, two - 2 * one, 0, 0)
    close(found, sums / (sums.std() + 1e-4))


def test_batch_normalised_by_hand():
    found = advantages.batch_normalised(f64(1, 3, 100), torch.tensor([True, True, False]))
    close(found, f64(-1, 1, 0) / (math.sqrt(2) + 1e-4))
    close(advantages.batch_normalised(f64(0.1, 0.1), torch.tensor([True, True])), f64(0, 0))


def test_generalised_advantages_by_hand():
    lengths = torch.tensor([3, 1])
    rewards, values = f64(0, 0, 1, 2), f64(0.5, 0.25, 0.5, 1)
    found = advantages.generalised(rewards, values, lengths, gamma=0.5, decay=0.5)
    # d = (0.5 * 0.25 - 0.5, 0.5 * 0.5 - 0.25, 1 - 0.5), A_3 = 0.5, A_2 = 0 + 0.25 * 0.5, A_1 = -0.375 + 0.25 * 0.125.
    close(found, f64(-0.34375, 0.125, 0.5, 1))
    close(advantages.reward_to_go(f64(1, 2, 3, 4), lengths), f64(6, 5, 3, 4))


def test_overlong_penalty_by_hand():
    found = advantages.overlong_penalty(torch.tensor([5, 80, 90, 100]), max_tokens=100, buffer=20)
    close(found, f64(0, 0, -0.5, -1))


def test_unscorable_completions_do_not_count():
    rewards = torch.tensor([2.0, NAN, 0.0], dtype=torch.float64)
    # mean 1 and sample variance (1 + 1) / 1 = 2 over the two that are scored.
    a = 1 / (math.sqrt(2) + 1e-4)
    close(group_relative(rewards, torch.tensor([0, 0, 0])), torch.tensor([a, 0, -a], dtype=torch.float64))


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16), st.floats(-1e3, 1e3))
def test_flat_groups_give_exactly_zero_and_all_others_are_finite(values: list[float], flat: float):
    rewards = torch.tensor([*values, *[flat] * 3], dtype=torch.float64)
    groups = torch.tensor([0] * len(values) + [1] * 3)
    found = group_relative(rewards, groups)
    assert found.isfinite().all()
    assert found[len(values) :].tolist() == [0, 0, 0]


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
    close(surrogates.token_clip(policy, old, advantages, low=0.2, high=0.2, most=1.3), expected)


def test_sequence_clip_by_hand():
    rows = torch.tensor([3, 3, 7])
    policy = torch.log(f64(4, 1, 1.1))  # geometric means 2 and 1.1
    found = surrogates.sequence_clip(policy, torch.zeros(3, dtype=torch.float64), f64(1, 1, 2), rows, low=0.2, high=0.2)
    close(found, f64(-1.2, -1.2, -2.2))


def test_clipped_weight_by_hand():
    policy = torch.log(f64(3, 0.5)).requires_grad_()
    loss = surrogates.clipped_weight(policy, torch.zeros(2, dtype=torch.float64), f64(2, -1), low=0.2, high=1.0)
    close(loss.detach(), f64(-2 * 2 * math.log(3), 0.8 * math.log(0.5)))
    loss.sum().backward()
    close(policy.grad, f64(-4, 0.8))


def test_importance_by_hand():
    old, behavior, rows = torch.log(f64(0.5, 3, 3)), torch.zeros(3, dtype=torch.float64), torch.tensor([0, 0, 1])
    close(surrogates.importance(old, behavior, rows, cap=2), f64(0.5, 2, 2))
    close(surrogates.importance(old, behavior, rows, cap=2, mode="mask"), f64(0.5, 0, 0))
    close(surrogates.importance(old, behavior, rows, cap=2, level="sequence"), f64(1.5, 1.5, 2))
    close(surrogates.importance(old, behavior, rows, cap=2, level="sequence", mode="mask"), f64(1.5, 1.5, 0))


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


def test_k3_by_hand():
    policy, reference = torch.tensor([0.0, 0.0]), torch.tensor([0.0, math.log(2)])
    close(kl.k3(policy, reference), torch.tensor([0.0, 1 - math.log(2)]))
    close(kl.k1(policy, reference), torch.tensor([0.0, -math.log(2)]))
    close(kl.k2(policy, reference), torch.tensor([0.0, math.log(2) ** 2 / 2]))


def test_the_weight_of_kl_follows_its_target():
    assert kl.adapted(0.1, measured=0.11, target=0.1) == pytest.approx(0.101)
    assert kl.adapted(0.1, measured=5.0, target=0.1) == pytest.approx(0.102)
    assert kl.adapted(0.1, measured=0.0, target=0.1) == pytest.approx(0.098)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sequence", [1 / 2, 1 / 8, 0]),
        ("token", [1 / 5, 1 / 5, 0]),
        ("constant", [1 / 16, 1 / 16, 0]),
        ("whole", [1 / 2, 1 / 2, 0]),
    ],
)
def test_weights_by_hand(name: str, expected: list[float]):
    lengths, used = torch.tensor([1, 4, 2]), torch.tensor([True, True, False])
    close(aggregation.by_name(name, max_tokens=8)(lengths, used), torch.tensor(expected))


def objective(name: str, *, max_tokens: int = 16, **changed: object):
    return OBJECTIVES[name](AlgorithmSettings(name=name, **changed), max_tokens=max_tokens, term_weights={})  # type: ignore[arg-type]


def scored(rewards: torch.Tensor, groups: torch.Tensor, lengths: torch.Tensor) -> Scored:
    return Scored(rewards, groups, lengths, torch.zeros(len(rewards), dtype=torch.bool))


def test_grpo_loss_and_gradient_by_hand():
    grpo = objective("grpo", kl_coefficient=0.1, importance_cap=2.0)
    policy = f64(-1.0, -2.0, -0.5).requires_grad_()
    # Behavior: the first token was sampled with 1/4 of the policy's probability (weight 4, capped at 2), the second
    # with twice the policy's (weight 1/2), the third with the policy's own (weight 1).
    behavior = policy.detach() - torch.log(f64(4.0, 0.5, 1.0))
    reference = policy.detach() + math.log(2)
    terms = TokenTerms(
        torch.tensor([0, 0, 1]), f64(1, 1, -1), f64(0.25, 0.25, 0.5), behavior, reference_logprobs_T=reference
    )
    loss = grpo.loss(terms, policy)
    loss.backward()
    penalty = 1 - math.log(2)  # k3 with d = log 2
    surrogate = 0.25 * 2 * -1 + 0.25 * 0.5 * -1 + 0.5 * 1 * 1
    assert loss.item() == pytest.approx(surrogate + 0.1 * penalty, abs=1e-12)
    # d/dpolicy: -weight * importance * A for the surrogate at ratio 1, and weight * beta * (1 - e^d) = -beta * weight.
    close(policy.grad, f64(0.25 * (-2 - 0.1), 0.25 * (-0.5 - 0.1), 0.5 * (1 - 0.1)))
    assert grpo.over_cap(terms, policy.detach()).tolist() == [True, False, False]


def test_grpo_prepares_from_the_whole_batch():
    batch = scored(f64(1, 0, NAN), torch.tensor([0, 0, 0]), torch.tensor([2, 1, 5]))
    grpo = objective("grpo")
    prepared = grpo.prepare(batch, None)
    close(grpo.weights(batch, prepared.used_N), torch.tensor([1 / 4, 1 / 2, 0]))
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(prepared.advantages_A, f64(a, a, -a, *[0] * 5))
    assert prepared.units == [(0,), (1,)]


def test_ppo_by_hand():
    """Two completions, of two tokens and one; KL of the first token 0.5 in the reward; whitened over the three tokens."""
    ppo = objective("ppo", kl_coefficient=0.2, kl_estimator="k1", kl_in="reward", gae_lambda=0.5)
    batch = scored(f64(1, 0), torch.tensor([0, 1]), torch.tensor([2, 1]))
    prepared = ppo.prepare(batch, Survey(f64(-1, -1, -1), f64(-1.5, -1, -1), f64(0.5, 0.25, 0.5)))
    # Rewards (-0.1, 1, 0): d_2 = 1 - 0.25, d_1 = -0.1 + 0.25 - 0.5, the other -0.5.
    raw = f64(-0.35 + 0.5 * 0.75, 0.75, -0.5)
    close(prepared.returns_A, raw + f64(0.5, 0.25, 0.5))
    close(prepared.advantages_A, (raw - raw.mean()) / (raw.std() + 1e-4))


def test_reinforce_pp_by_hand():
    """Returns to go with KL in the reward, normalised over all tokens whatever their group."""
    found = objective("reinforce_pp", kl_coefficient=0.5, kl_estimator="k1", kl_in="reward").prepare(
        scored(f64(1, 0), torch.tensor([0, 0]), torch.tensor([2, 1])), Survey(f64(-1, -1, -1), f64(-2, -1, -1))
    )
    to_go = f64(1 - 0.5, 1, 0)
    close(found.advantages_A, (to_go - to_go.mean()) / (to_go.std() + 1e-4))


def test_what_does_not_count():
    """Completions that were cut off, flat groups, and reward taken off long ones."""
    groups, lengths = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 16, 1, 1, 1])
    batch = Scored(f64(1, 1, 0, 2, 2), groups, lengths, torch.tensor([False, True, False, False, False]))
    assert objective("grpo", mask_truncated=True).prepare(batch, None).used_N.tolist() == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert objective("grpo", flat_groups="drop").prepare(batch, None).used_N.tolist() == [True] * 3 + [False] * 2
    found = objective("dr_grpo", overlong_buffer=0.5).prepare(batch, None).advantages_A
    close(found[[0, 1, 17]], f64(1, 0, 0) - 1 / 3)
    online = objective("online_dpo", mask_truncated=True).prepare(batch, None)
    assert (online.units, online.pairs, online.ties) == ([(0, 2)], 1, 1)


# One group: rewards 1 and 0, two tokens and one, ratios 3/2, 1 and 1/2 to an old probability of 1/e. Of its advantages,
# GROUP is (r - mean) / (std + epsilon), BATCH that of a token whose return is 1 among returns 1, 1, 0.
GROUP = 0.5 / (math.sqrt(0.5) + 1e-4)
BATCH = (1 / 3) / (math.sqrt(1 / 3) + 1e-4)
POLICY = [-1 + math.log(1.5), -1.0, -1 + math.log(0.5)]
ROOT = math.sqrt(1.5)  # the ratio of the completion of two
TINY = 1 / (1 + 3**0.1)  # sigmoid(-0.1 log 3)
BY_HAND: dict[str, tuple[dict[str, float], float, list[float]]] = {
    # 1.2 and 0.8 are clipped: only the middle token has a gradient.
    "grpo": ({}, GROUP * (-1.2 / 4 - 1 / 4 + 0.8 / 2), [0, -GROUP / 4, 0]),
    "dr_grpo": ({}, 0.5 * (-1.2 - 1 + 0.8) / 8, [0, -0.5 / 8, 0]),
    "dapo": ({"clip_high": 0.28}, GROUP * (-1.28 - 1 + 0.8) / 3, [0, -GROUP / 3, 0]),
    "gspo": ({"clip_high": 1.0}, GROUP * (-ROOT + 0.8) / 2, [-GROUP * ROOT / 4, -GROUP * ROOT / 4, 0]),
    "cispo": (
        {"clip_low": 1.0},
        GROUP * (-1.2 * POLICY[0] - POLICY[1] + 0.5 * POLICY[2]) / 3,
        [-1.2 * GROUP / 3, -GROUP / 3, 0.5 * GROUP / 3],
    ),
    "rloo": ({}, (-POLICY[0] - POLICY[1] + POLICY[2]) / 2, [-0.5, -0.5, 0.5]),
    "reinforce_pp": ({}, BATCH * (-1.2 - 1 + 2 * 0.8) / 3, [0, -BATCH / 3, 0]),
    # Values of 1/2 everywhere move the returns to 1/2, 1/2 and -1/2, which are the same once normalised.
    "ppo": ({}, BATCH * (-1.2 - 1 + 2 * 0.8) / 3, [0, -BATCH / 3, 0]),
    "online_dpo": ({}, math.log(1 + 3**-0.1), [-0.1 * TINY, -0.1 * TINY, 0.1 * TINY]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_of_each_algorithm_by_hand(name: str):
    changed, expected, gradient = BY_HAND[name]
    one = objective(name, max_tokens=4, **changed)
    batch, old = scored(f64(1, 0), torch.tensor([0, 0]), torch.tensor([2, 1])), f64(-1, -1, -1)
    prepared = one.prepare(batch, Survey(old, old, f64(0.5, 0.5, 0.5)))
    rows = torch.tensor([0, 0, 1])
    weights = one.weights(batch, prepared.used_N).double()[rows]
    policy = f64(*POLICY).requires_grad_()
    loss = one.loss(TokenTerms(rows, prepared.advantages_A, weights, old, old, old), policy)
    loss.backward()
    assert prepared.units == ([(0, 1)] if name == "online_dpo" else [(0,), (1,)])
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    close(policy.grad, f64(*gradient), atol=1e-7, rtol=1e-6)


@given(
    st.lists(st.sampled_from([0.0, 0.1 + 0.2, 0.3, 0.3 + 1e-12, 0.31, -0.3, 1e6, 1e6 + 1e-4]), min_size=2, max_size=4),
    st.lists(st.sampled_from([0.3, 1.0]), min_size=2, max_size=3),
)
def test_the_learner_the_replay_and_the_metrics_agree_on_groups_without_signal(one: list[float], other: list[float]):
    rewards = torch.tensor([*one, *other], dtype=torch.float64)
    groups = torch.tensor([0] * len(one) + [1] * len(other))
    expected = torch.tensor([is_zero_variance(one)] * len(one) + [is_zero_variance(other)] * len(other))
    assert torch.equal(advantages.flat_groups(rewards, groups), expected)
    assert not group_relative(rewards, groups)[expected].any()
