"""Each algorithm's advantages, weights, loss and gradient against values worked by hand."""

import math

import pytest
import torch

from learner.algorithms.base import LossInputs, OldLogprobs
from learner.algorithms.table import ALGORITHMS
from learner.batch import RewardedBatch
from tests.helpers.presets import default_algorithm
from tests.helpers.rewarded import f64, rewarded_batch

close = torch.testing.assert_close
NAN = float("nan")


def test_grpo_loss_and_gradient_by_hand():
    grpo = default_algorithm("grpo", kl_coefficient=0.1, importance_sampling_cap=2.0)
    policy = f64(-1.0, -2.0, -0.5).requires_grad_()
    # Behavior: the first token was sampled with 1/4 of the policy's probability (weight 4, capped at 2), the second
    # with twice the policy's (weight 1/2), the third with the policy's own (weight 1).
    behavior = policy.detach() - torch.log(f64(4.0, 0.5, 1.0))
    reference = policy.detach() + math.log(2)
    inputs = LossInputs(
        rows_T=torch.tensor([0, 0, 1]),
        advantages_T=f64(1, 1, -1),
        weights_T=f64(0.25, 0.25, 0.5),
        behavior_logprobs_T=behavior,
        policy_logprobs_T=policy,
        old_logprobs_T=policy.detach(),
        reference_logprobs_T=reference,
    )
    loss = grpo.loss(inputs)
    loss.backward()
    penalty = 1 - math.log(2)  # k3 with d = log 2
    surrogate = 0.25 * 2 * -1 + 0.25 * 0.5 * -1 + 0.5 * 1 * 1
    assert loss.item() == pytest.approx(surrogate + 0.1 * penalty, abs=1e-12)
    # d/dpolicy: -weight * importance * A for the surrogate at ratio 1, and weight * beta * (1 - e^d) = -beta * weight.
    close(policy.grad, f64(0.25 * (-2 - 0.1), 0.25 * (-0.5 - 0.1), 0.5 * (1 - 0.1)))
    assert grpo.over_cap(inputs).tolist() == [True, False, False]


def test_grpo_prepares_from_the_whole_batch():
    batch = rewarded_batch(f64(1, 0, NAN), torch.tensor([0, 0, 0]), torch.tensor([2, 1, 5]))
    grpo = default_algorithm("grpo")
    prepared = grpo.prepare(batch, None)
    close(grpo.weights(batch, prepared.counted_N), torch.tensor([1 / 4, 1 / 2, 0]))
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(prepared.advantages_A, f64(a, a, -a, *[0] * 5))
    assert prepared.pack_units == [(0,), (1,)]


def test_ppo_by_hand():
    """Completions of two tokens and one; KL of the first token 0.5 in the reward; normalized over the three tokens."""
    ppo = default_algorithm("ppo", kl_coefficient=0.2, kl_estimator="k1", kl_placement="reward", gae_lambda=0.5)
    batch = rewarded_batch(f64(1, 0), torch.tensor([0, 1]), torch.tensor([2, 1]))
    prepared = ppo.prepare(batch, OldLogprobs(f64(-1, -1, -1), f64(-1.5, -1, -1), f64(0.5, 0.25, 0.5)))
    # Rewards (-0.1, 1, 0): d_2 = 1 - 0.25, d_1 = -0.1 + 0.25 - 0.5, the other -0.5.
    raw = f64(-0.35 + 0.5 * 0.75, 0.75, -0.5)
    close(prepared.returns_A, raw + f64(0.5, 0.25, 0.5))
    close(prepared.advantages_A, (raw - raw.mean()) / (raw.std() + 1e-4))


def test_reinforce_pp_by_hand():
    """Returns to go with KL in the reward, normalized over all tokens whatever their group."""
    prepared = default_algorithm("reinforce_pp", kl_coefficient=0.5, kl_estimator="k1", kl_placement="reward").prepare(
        rewarded_batch(f64(1, 0), torch.tensor([0, 0]), torch.tensor([2, 1])),
        OldLogprobs(f64(-1, -1, -1), f64(-2, -1, -1)),
    )
    to_go = f64(1 - 0.5, 1, 0)
    close(prepared.advantages_A, (to_go - to_go.mean()) / (to_go.std() + 1e-4))


def test_what_does_not_count():
    """Completions that were cut off, groups without variance, and reward taken off long ones."""
    groups, lengths = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 16, 1, 1, 1])
    batch = RewardedBatch(f64(1, 1, 0, 2, 2), groups, lengths, torch.tensor([False, True, False, False, False]))
    masked = default_algorithm("grpo", mask_truncated=True).prepare(batch, None)
    assert masked.counted_N.tolist() == [True, False, True, True, True]
    filtered = default_algorithm("grpo", zero_variance_groups="filter").prepare(batch, None)
    assert filtered.counted_N.tolist() == [True] * 3 + [False] * 2
    advantages_A = default_algorithm("dr_grpo", overlong_buffer=0.5).prepare(batch, None).advantages_A
    close(advantages_A[[0, 1, 17]], f64(1, 0, 0) - 1 / 3)
    online = default_algorithm("online_dpo", mask_truncated=True).prepare(batch, None)
    assert (online.pack_units, online.pairs, online.ties) == ([(0, 2)], 1, 1)


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
    # Values of 1/2 everywhere move the returns to 1/2, 1/2 and -1/2, which are the same once normalized.
    "ppo": ({}, BATCH * (-1.2 - 1 + 2 * 0.8) / 3, [0, -BATCH / 3, 0]),
    "online_dpo": ({}, math.log(1 + 3**-0.1), [-0.1 * TINY, -0.1 * TINY, 0.1 * TINY]),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_of_each_algorithm_by_hand(name: str):
    changed, expected, gradient = BY_HAND[name]
    algorithm = default_algorithm(name, max_tokens=4, **changed)
    batch, old = rewarded_batch(f64(1, 0), torch.tensor([0, 0]), torch.tensor([2, 1])), f64(-1, -1, -1)
    prepared = algorithm.prepare(batch, OldLogprobs(old, old, f64(0.5, 0.5, 0.5)))
    rows = torch.tensor([0, 0, 1])
    weights = algorithm.weights(batch, prepared.counted_N).double()[rows]
    policy = f64(*POLICY).requires_grad_()
    loss = algorithm.loss(
        LossInputs(
            rows_T=rows,
            advantages_T=prepared.advantages_A,
            weights_T=weights,
            behavior_logprobs_T=old,
            policy_logprobs_T=policy,
            old_logprobs_T=old,
            reference_logprobs_T=old,
        )
    )
    loss.backward()
    assert prepared.pack_units == ([(0, 1)] if name == "online_dpo" else [(0,), (1,)])
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    close(policy.grad, f64(*gradient), atol=1e-7, rtol=1e-6)
