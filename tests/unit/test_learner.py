"""Every algorithm through the learner: micro-batches, several optimizer steps, a critic, a target for KL, checkpoints."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import LearnerSettings
from learner import checkpoint
from learner.learner import Learner
from learner.objectives import OBJECTIVES
from learner.optimizer import learning_rate
from tests.presets import objective
from tests.unit.test_policy import a_table, make_policy

FAST = LearnerSettings(learning_rate=1e-3, micro_batch_tokens=8192)


def learner(folder: Path, name: str, settings: LearnerSettings = FAST, **changed: Any) -> Learner:
    """With the preset's settings."""
    return Learner(make_policy(folder), objective(name, max_tokens=8, **changed), settings, steps=10)


def with_opinions(one: Learner) -> Learner:
    """A critic that says something."""
    if one.critic is not None:
        with torch.no_grad():
            one.critic.flat.normal_(generator=torch.Generator().manual_seed(0))
    return one


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up(tiny_model: Path, name: str):
    gradients = []
    for tokens in (8192, 20, 1):
        one = with_opinions(learner(tiny_model, name, replace(FAST, micro_batch_tokens=tokens)))
        sums = one.accumulate(a_table())
        critic = one.critic.flat.grad if one.critic else torch.zeros(())
        gradients.append((one.policy.lora.flat.grad, critic, sums["loss"]))
    assert gradients[0][0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_epochs_of_two_minibatches_are_four_optimizer_steps(tiny_model: Path, name: str):
    one = learner(tiny_model, name, epochs=2, minibatches=2)
    before = one.adapter().flat
    stats = one.step(a_table())
    assert (one.version, stats.optimizer_steps, one.optimizer.state[one.policy.lora.flat]["step"]) == (1, 4, 4)
    assert stats.trained_completions == 2 * (
        4 if name == "online_dpo" else 8 if one.critic else stats.trained_completions // 2
    )
    assert stats.clipped_share is not None and not torch.equal(one.adapter().flat, before)


def test_the_second_optimizer_step_compares_with_the_policy_before_the_first(tiny_model: Path):
    """With a learning rate that throws the policy far, clipping shows from the second step on."""
    wild = LearnerSettings(learning_rate=0.1, micro_batch_tokens=8192, max_grad_norm=1e6)
    stats = learner(tiny_model, "grpo", wild, epochs=3).step(a_table())
    assert stats.clipped_share is not None and 0.1 < stats.clipped_share < 1
    assert learner(tiny_model, "grpo", wild).step(a_table()).clipped_share is None


def test_a_critic_warms_up_alone_and_learns_the_returns(tiny_model: Path):
    one = learner(tiny_model, "ppo", critic_warmup_steps=60, value_learning_rate=0.1, value_clip=None)
    before, rows = one.adapter().flat, a_table()
    explained = [one.step(rows).explained_variance for _ in range(60)]
    assert torch.equal(one.adapter().flat, before)
    assert explained[0] == pytest.approx(0.0, abs=1e-6) and explained[-1] > 0.6
    one.step(rows)
    assert not torch.equal(one.adapter().flat, before)


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_the_weight_of_kl_follows_its_target(tiny_model: Path, where: str):
    # The policy is far from the base model: its KL is over the one target and under the other.
    for target, change in ((1e-4, 1.02), (1e4, 0.98)):
        one = learner(tiny_model, "grpo", kl_coefficient=0.1, kl_in=where, kl_estimator="k3", kl_target=target)
        stats = one.step(a_table())
        assert (stats.kl_coefficient, one.objective.kl_coefficient) == (0.1, pytest.approx(0.1 * change))
        assert stats.reference_kl > 1e-3


def test_an_entropy_bonus_raises_entropy(tiny_model: Path):
    found = []
    for coefficient in (0.0, 1.0):
        one = learner(tiny_model, "grpo", replace(FAST, learning_rate=1e-2), entropy_coefficient=coefficient)
        found.append([one.step(a_table()).entropy for _ in range(4)])
    assert found[1][-1] > found[0][-1] + 0.05 and found[1][-1] > found[1][0]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_checkpoint_keeps_critic_and_coefficient(tiny_model: Path, tmp_path: Path, name: str):
    changed: dict[str, Any] = {"kl_coefficient": 0.1, "kl_target": 1e-4}
    one, rows = learner(tiny_model, name, **changed), a_table()
    one.step(rows)
    checkpoint.save(tmp_path, one, {}, base_model="tiny", keep=1)
    other = learner(tiny_model, name, **changed)
    found = checkpoint.find(tmp_path, "auto")
    assert found is not None
    checkpoint.load(found, other)
    first, second = one.step(rows), other.step(rows)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert torch.equal(one.adapter().flat, other.adapter().flat)
    assert one.objective.kl_coefficient == other.objective.kl_coefficient != 0.1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 0.6 + 0.2 * math.sqrt(2), 0.6, 0.6 - 0.2 * math.sqrt(2), 0.2]),
    ],
)
def test_learning_rates_by_hand(schedule: str, expected: list[float]):
    """Two steps of warm-up, then four down to a fifth."""
    settings = LearnerSettings(learning_rate=2.0, schedule=schedule, warmup_steps=2, final_rate=0.2)
    for version, factor in enumerate(expected):
        assert learning_rate(settings, version, 6) == pytest.approx(2 * factor)
