"""Every algorithm through the learner: micro-batches, optimizer steps, a critic, a target for KL, checkpoints."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from learner.algorithms.table import ALGORITHMS, supervised
from learner.batch import Rollouts
from learner.learner import Learner
from learner.optimizer import Schedule
from learner.parallel.data_parallel import DataParallel
from learner.parallel.worker import LearnerWorker
from tests.helpers.learners import a_table, a_table_of_turns, gradient_of, make_learner, make_policy, plain_logprobs
from tests.helpers.presets import algorithm


def learner_of(folder: Path, name: str, **changed: object) -> Learner:
    """A learner with the preset's settings, but for those that are `changed`."""
    return make_learner(make_policy(folder), algorithm(name, max_tokens=8, **changed))


@pytest.mark.parametrize("make_table", [a_table, a_table_of_turns])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_add_up(tiny_model: Path, name: str, make_table: Callable[[], pa.Table]):
    gradients = []
    for tokens in (8192, 20, 1):
        learner = make_learner(make_policy(tiny_model), algorithm(name, max_tokens=8), micro_batch_tokens=tokens)
        if learner.critic is not None:
            with torch.no_grad():
                learner.critic.flat.normal_(generator=torch.Generator().manual_seed(0))
        sums = learner.accumulate(make_table())
        critic = learner.critic.flat.grad if learner.critic else torch.zeros(())
        gradients.append((gradient_of(learner.policy.lora), critic, torch.tensor(sums["loss"])))
    assert gradients[0][0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_epochs_of_two_minibatches_are_four_optimizer_steps(tiny_model: Path, name: str):
    learner = learner_of(tiny_model, name, epochs=2, minibatches=2)
    before = learner.adapter().flat
    stats = learner.step(a_table())
    assert (learner.version, stats.optimizer_steps, learner.optimizer.state()["step"]) == (1, 4, 4)
    if name == "online_dpo":
        assert stats.trained_completions == 2 * 4
    elif learner.critic is not None:
        assert stats.trained_completions == 2 * 8
    assert stats.trained_completions % 2 == 0
    assert stats.clipped_share is not None and not torch.equal(learner.adapter().flat, before)


def test_the_second_optimizer_step_compares_with_the_policy_before_the_first(tiny_model: Path):
    """With a learning rate that throws the policy far, clipping shows from the second step on."""
    shares = []
    for epochs in (3, 1):
        grpo = algorithm("grpo", max_tokens=8, epochs=epochs)
        learner = make_learner(make_policy(tiny_model), grpo, learning_rate=0.1, max_grad_norm=1e6)
        shares.append(learner.step(a_table()).clipped_share)
    assert shares[0] is not None and 0.1 < shares[0] < 1
    assert shares[1] is None


def test_a_critic_warms_up_alone_and_learns_the_returns(tiny_model: Path):
    learner = learner_of(tiny_model, "ppo", critic_warmup_steps=60, value_learning_rate=0.1, value_clip=None)
    before, rows = learner.adapter().flat, a_table()
    explained = [learner.step(rows).explained_variance for _ in range(60)]
    assert torch.equal(learner.adapter().flat, before)
    assert explained[0] == pytest.approx(0.0, abs=1e-6)
    assert explained[-1] is not None and explained[-1] > 0.6
    learner.step(rows)
    assert not torch.equal(learner.adapter().flat, before)


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_the_weight_of_kl_follows_its_target(tiny_model: Path, placement: str):
    # The policy is far from the base model: its KL is over the one target and under the other.
    kl = {"kl_coefficient": 0.1, "kl_placement": placement, "kl_estimator": "k3"}
    for target, change in ((1e-4, 1.02), (1e4, 0.98)):
        learner = learner_of(tiny_model, "grpo", kl_target=target, **kl)
        stats = learner.step(a_table())
        assert (stats.kl_coefficient, learner.algorithm.kl_coefficient) == (0.1, pytest.approx(0.1 * change))
        assert stats.reference_kl is not None and stats.reference_kl > 1e-3


def test_an_entropy_bonus_raises_entropy(tiny_model: Path):
    entropies = []
    for coefficient in (0.0, 1.0):
        grpo = algorithm("grpo", max_tokens=8, entropy_coefficient=coefficient)
        learner = make_learner(make_policy(tiny_model), grpo, learning_rate=1e-2)
        entropies.append([learner.step(a_table()).entropy for _ in range(4)])
    without, bonus = entropies
    assert bonus[-1] > without[-1] + 0.05 and bonus[-1] > bonus[0]


def worker_of(
    learner: Learner, checkpoints: Path, *, make_supervised: Callable[[], Learner] | None = None
) -> LearnerWorker:
    return LearnerWorker(
        learner,
        make_supervised=make_supervised or (lambda: learner),
        ranks=DataParallel(),
        checkpoints=checkpoints,
        base_model="tiny",
        keep=1,
        adapter_leaves_process=False,
        notes=[],
    )


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_checkpoint_keeps_critic_and_coefficient(tiny_model: Path, tmp_path: Path, name: str):
    changed: dict[str, object] = {"kl_coefficient": 0.1, "kl_target": 1e-4}
    learner, rows = learner_of(tiny_model, name, **changed), a_table()
    learner.step(rows)
    folder = worker_of(learner, tmp_path).save({"noted": [1, 2]})
    other = learner_of(tiny_model, name, **changed)
    resumed = worker_of(other, tmp_path).resume("auto")
    assert resumed is not None
    assert (resumed.folder, resumed.version, resumed.state["noted"]) == (folder, 1, [1, 2])
    assert other.algorithm.kl_coefficient == learner.algorithm.kl_coefficient != 0.1
    stats, other_stats = learner.step(rows), other.step(rows)
    assert replace(stats, seconds=0.0) == replace(other_stats, seconds=0.0)
    assert torch.equal(learner.adapter().flat, other.adapter().flat)
    assert learner.algorithm.kl_coefficient == other.algorithm.kl_coefficient != 0.1


def test_a_checkpoint_of_another_dtype_is_resumed_with_a_line(tiny_model: Path, tmp_path: Path):
    worker_of(make_learner(make_policy(tiny_model), algorithm("grpo", max_tokens=8)), tmp_path).save({})
    bf16 = make_learner(make_policy(tiny_model, dtype="bfloat16"), algorithm("grpo", max_tokens=8))
    resumed = worker_of(bf16, tmp_path).resume("auto")
    assert resumed is not None
    assert resumed.notes == ["changed since this checkpoint: model.dtype is bfloat16, it was float32"]


def test_without_a_checkpoint_nothing_is_resumed(tiny_model: Path, tmp_path: Path):
    learner = learner_of(tiny_model, "grpo")
    before = learner.adapter().flat
    assert worker_of(learner, tmp_path).resume("auto") is None
    assert learner.version == 0 and torch.equal(learner.adapter().flat, before)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 0.6 + 0.2 * math.sqrt(2), 0.6, 0.6 - 0.2 * math.sqrt(2), 0.2]),
    ],
)
def test_learning_rates_by_hand(kind: str, expected: list[float]):
    """Two steps of warm-up, then four down to a fifth."""
    schedule = Schedule(kind, warmup_steps=2, min_lr_ratio=0.2, steps=6)
    for version, factor in enumerate(expected):
        assert schedule.learning_rate(2.0, version) == pytest.approx(2 * factor)


def test_a_warm_up_maximizes_the_likelihood_of_its_rows(tiny_model: Path, tmp_path: Path):
    """The loss is the mean negative log-likelihood that transformers alone gives, at temperature 1 and without
    truncation, and its gradient is transformers' too. The version stays.
    """
    policy, rows = make_policy(tiny_model, temperature=0.5), a_table()
    plain_lora, logprobs, _ = plain_logprobs(tiny_model, policy, Rollouts.from_table(rows))
    sampled = [torch.from_numpy(mask) for mask in Rollouts.from_table(rows).sampled]
    expected = -torch.cat([x[mask] for x, mask in zip(logprobs, sampled, strict=True)]).mean()
    expected.backward()
    supervised_learner = make_learner(policy, supervised(max_tokens=8), max_grad_norm=1e9)
    worker = worker_of(make_learner(policy, algorithm()), tmp_path, make_supervised=lambda: supervised_learner)
    stats = worker.warm_up(rows)
    assert stats.loss == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient_of(policy.lora), gradient_of(plain_lora), atol=1e-5, rtol=1e-4)
    losses = [worker.warm_up(rows).loss for _ in range(20)]
    assert losses[-1] < stats.loss - 1 and worker.learner.version == 0
    worker.end_warm_up()
    assert worker.learner.optimizer.state() == {}
