"""An algorithm of the user's own: a Recipe in a file or module that algorithm.name names."""

import re
from pathlib import Path

import pytest
import torch

from conf.errors import UsageError
from conf.schema import AlgorithmSettings
from learner.algorithms.base import Algorithm
from learner.algorithms.policy_gradient import PolicyGradient
from learner.algorithms.table import has_critic, make_algorithm
from tests.helpers.learners import a_table, make_learner, make_policy
from tests.helpers.rewarded import f64, rewarded_batch

SOURCE = '''
import torch

from learner.algorithms.recipe import Recipe, generalized, reinforce, token_clip
from learner.losses.aggregation import sequence_sum, token_mean


def best_of_batch(inputs):
    """1 for the best trajectories of the batch, -2 for the others."""
    best_N = inputs.rewards_N == inputs.rewards_N.max()
    return inputs.batch.per_token(torch.where(best_N, 1.0, -2.0).double()), None


RECIPE = Recipe(best_of_batch, reinforce, sequence_sum, ratio=None)
WITH_CRITIC = Recipe(generalized, token_clip, token_mean, ratio=None, has_critic=True)
NOT_A_RECIPE = {"advantage": best_of_batch}
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "recipes.py"
    file.write_text(SOURCE)
    return file


def named(name: str) -> Algorithm:
    settings = AlgorithmSettings(name=name, importance_sampling_cap=None)
    return make_algorithm(settings, max_tokens=8, term_weights={})


def test_a_recipe_in_a_file_is_the_algorithm(file: Path):
    algorithm = named(f"{file}:RECIPE")
    assert isinstance(algorithm, PolicyGradient)
    assert not (algorithm.has_critic or algorithm.reference_in_loss or algorithm.reference_in_reward)
    batch = rewarded_batch(f64(1, 0, 3), torch.tensor([0, 0, 0]), torch.tensor([2, 1, 1]))
    prepared = algorithm.prepare(batch, None)
    assert prepared.advantages_A.tolist() == [-2, -2, -2, 1]
    assert algorithm.weights(batch, prepared.counted_N).tolist() == pytest.approx([1 / 3] * 3)


def test_whether_a_users_recipe_has_a_critic_is_known_before_anything_loads(file: Path):
    assert not has_critic(f"{file}:RECIPE")
    assert has_critic(f"{file}:WITH_CRITIC") and named(f"{file}:WITH_CRITIC").has_critic


def test_a_recipe_is_found_in_a_module_too():
    algorithm = named("learner.algorithms.table:GRPO")
    batch = rewarded_batch(f64(1, 0), torch.tensor([0, 0]), torch.tensor([1, 1]))
    same = named("grpo").prepare(batch, None)
    assert torch.equal(algorithm.prepare(batch, None).advantages_A, same.advantages_A)


def test_the_learner_trains_by_a_users_recipe(tiny_model: Path, file: Path):
    learner = make_learner(make_policy(tiny_model), named(f"{file}:RECIPE"))
    before = learner.adapter().flat
    stats = learner.step(a_table())
    assert stats.trained_completions == 8 and stats.grad_norm > 0
    assert not torch.equal(learner.adapter().flat, before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gppo", "is neither one of grpo, .*online_dpo nor a module:RECIPE"),
        ("{file}:RECIPES", "has no attribute 'RECIPES'"),
        ("{file}:NOT_A_RECIPE", "not a Recipe"),
        ("{folder}/missing.py:RECIPE", "no file .*missing.py"),
        ("no_such_module:RECIPE", "No module named 'no_such_module'"),
        ("learner.algorithms.online_dpo:OnlineDPO", "not a Recipe"),
        (":RECIPE", "module:RECIPE"),
    ],
)
def test_what_is_no_recipe_is_refused_with_a_sentence(file: Path, name: str, message: str):
    full = name.format(file=file, folder=file.parent)
    with pytest.raises(UsageError, match=f"algorithm.name={re.escape(full)}.*{message}"):
        named(full)
