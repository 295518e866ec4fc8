"""Trajectories of several turns: what the policy sampled is trained; what was given from outside is read, no more."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.types import Turn
from learner.batch import Rollouts
from learner.minibatches import MicroBatch, micro_batches, unit_costs
from tests.helpers.learners import a_table_of_turns, gradient_of, make_learner, make_policy, plain_logprobs
from tests.helpers.presets import default_algorithm
from tests.helpers.rollouts import group, table, turns_of

EACH = [(row,) for row in range(8)]
REWARDS = [1.0, 0.0, 0.5, 0.25]  # of each group of a_table_of_turns
SAMPLED = [7, 5, 3, 2, 1, 6, 5, 1]


def packed(rollouts: Rollouts, max_tokens: int = 10_000) -> list[MicroBatch]:
    return list(micro_batches(rollouts, EACH, max_tokens=max_tokens, device="cpu"))


def only_sampled(values: Sequence[torch.Tensor], rollouts: Rollouts) -> list[torch.Tensor]:
    """Of each trajectory, the values at its sampled tokens."""
    return [row[torch.from_numpy(mask)] for row, mask in zip(values, rollouts.sampled, strict=True)]


def test_lengths_count_sampled_tokens():
    rollouts = Rollouts.from_table(a_table_of_turns())
    assert rollouts.rewarded.lengths_N.tolist() == SAMPLED
    assert [len(logprobs) for logprobs in rollouts.behavior_logprobs] == SAMPLED
    # Three sampled tokens, two given ones, four sampled ones.
    assert rollouts.sampled[0].tolist() == [True] * 3 + [False] * 2 + [True] * 4
    assert len(rollouts.token_ids[0]) == rollouts.prompt_lengths[0] + 9


@pytest.mark.parametrize("max_tokens", [10_000, 25, 1])
def test_a_stream_predicts_sampled_tokens_alone(max_tokens: int):
    """Whatever the rows that are packed together, each sampled token is a target once, and no given token is."""
    rollouts = Rollouts.from_table(a_table_of_turns())
    batches = packed(rollouts, max_tokens)
    sampled = [
        tokens[start:][mask]
        for tokens, start, mask in zip(rollouts.token_ids, rollouts.prompt_lengths, rollouts.sampled, strict=True)
    ]
    assert torch.cat([batch.targets_T for batch in batches]).tolist() == np.concatenate(sampled).tolist()
    assert torch.cat([batch.token_T for batch in batches]).tolist() == list(range(sum(SAMPLED)))
    assert torch.cat([batch.row_T for batch in batches]).bincount().tolist() == SAMPLED


def test_given_tokens_cost_as_much_of_a_stream_as_sampled_ones():
    rollouts = Rollouts.from_table(a_table_of_turns())
    (batch,) = packed(rollouts)
    assert sum(unit_costs(rollouts, EACH)) == len(batch.input_ids_S)


@pytest.mark.parametrize("max_tokens", [10_000, 25, 1])
def test_packed_logprobs_and_gradients_equal_plain_forward_passes(tiny_model: Path, max_tokens: int):
    policy = make_policy(tiny_model, temperature=0.8)
    rollouts = Rollouts.from_table(a_table_of_turns())
    outputs = [policy.logprobs(batch) for batch in packed(rollouts, max_tokens)]
    oracle, *plain = plain_logprobs(tiny_model, policy, rollouts, temperature=0.8)
    expected, expected_entropy = (torch.cat(only_sampled(values, rollouts)) for values in plain)
    logprobs = torch.cat([output.logprobs_T for output in outputs])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    entropy = torch.cat([output.entropy_T for output in outputs])
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)

    expected.square().sum().backward()
    logprobs.square().sum().backward()
    difference = (gradient_of(policy.lora) - gradient_of(oracle)).norm() / gradient_of(oracle).norm()
    assert difference < 1e-5


@pytest.mark.parametrize("micro_batch_tokens", [8192, 20])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum"])
def test_the_loss_weighs_sampled_tokens_alone(tiny_model: Path, aggregation: str, micro_batch_tokens: int):
    """The gradient of REINFORCE on plain forward passes: means over sampled tokens, and nothing for given ones."""
    settings = {"scale_rewards": "none", "importance_sampling_cap": None, "loss_aggregation": aggregation}
    policy = make_policy(tiny_model)
    learner = make_learner(policy, default_algorithm("rloo", **settings), micro_batch_tokens=micro_batch_tokens)
    sums = learner.accumulate(a_table_of_turns())

    rollouts = Rollouts.from_table(a_table_of_turns())
    oracle, logprobs, _ = plain_logprobs(tiny_model, policy, rollouts)
    mean = sum(REWARDS) / 4
    loss = torch.zeros(())
    for reward, count, values in zip(REWARDS * 2, SAMPLED, only_sampled(logprobs, rollouts), strict=True):
        weight = {"sequence_mean": 1 / (8 * count), "token_mean": 1 / sum(SAMPLED), "sequence_sum": 1 / 8}[aggregation]
        loss = loss - weight * (reward - mean) * values.sum()
    loss.backward()
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert sums["tokens"] == sum(SAMPLED)
    difference = (gradient_of(policy.lora) - gradient_of(oracle)).norm() / gradient_of(oracle).norm()
    assert difference < 1e-4


def gradient_on(folder: Path, first: list[int], turns: Sequence[Turn]) -> torch.Tensor:
    """The gradient on a trajectory of these tokens and turns beside a worse one."""
    learner = make_learner(make_policy(folder), default_algorithm("grpo"))
    rows = group(0, [1.0, 0.0], completions=[first, [50, 51]], turns=[turns, turns_of(2)])
    learner.accumulate(table([rows]))
    return gradient_of(learner.policy.lora)


def test_given_tokens_are_read_but_those_after_the_last_sampled_one_change_nothing(tiny_model: Path):
    ends_given, ends_sampled = turns_of(2, 3), turns_of(2, 3, 1)
    plain = gradient_on(tiny_model, [40, 41], turns_of(2))
    for given in ([60, 61, 62], [70, 71, 72]):
        torch.testing.assert_close(gradient_on(tiny_model, [40, 41, *given], ends_given), plain, atol=1e-6, rtol=1e-5)
    first, second = (
        gradient_on(tiny_model, [40, 41, *given, 42], ends_sampled) for given in ([60, 61, 62], [70, 71, 72])
    )
    assert (first - second).norm() > 1e-3 * first.norm()
