"""MLPs in tiles: the same numbers, and nothing is computed twice that checkpointing computes once."""

from pathlib import Path

import pytest
import torch

from learner.model.policy import Policy
from tests.helpers.learners import a_table, gradient_of, make_learner, make_policy
from tests.helpers.presets import algorithm


def gradient(folder: Path, tile: int | None) -> torch.Tensor:
    policy = make_policy(folder, checkpointing=tile is not None, tile_tokens=tile)
    learner = make_learner(policy, algorithm(kl_coefficient=0.1))
    learner.accumulate(a_table())
    return gradient_of(learner.policy.lora)


@pytest.mark.parametrize("tile", [1, 7, 20])
def test_gradients_in_tiles_equal_plain_ones(tiny_model: Path, tile: int):
    plain = gradient(tiny_model, None)
    assert plain.norm() > 1e-3
    assert (gradient(tiny_model, tile) - plain).norm() / plain.norm() < 1e-5


def calls_of_mlps(policy: Policy) -> list[int]:
    """Appends the tokens of each call of an MLP's first layer to the list that it returns."""
    calls: list[int] = []
    for layer in policy.lora.model.get_decoder().layers:
        layer.mlp.act_fn.register_forward_hook(lambda _module, _inputs, output: calls.append(output.shape[1]))
    return calls


def test_each_tile_is_computed_once_forward_and_once_more_for_its_gradient(tiny_model: Path):
    policy = make_policy(tiny_model, checkpointing=True, tile_tokens=9)
    calls = calls_of_mlps(policy)
    sums = make_learner(policy, algorithm()).accumulate(a_table())
    layers = policy.lora.model.config.num_hidden_layers
    assert max(calls) <= 9
    assert sum(calls) == 2 * layers * int(sums["stream_tokens"])
