"""Every example runs, and does what its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.reward import RewardWorker
from actors.types import Score
from conf.compose import load_settings
from conf.schema import TermSettings
from examples import grpo_in_one_file, my_algorithm
from learner.algorithms.base import LossInputs
from learner.algorithms.recipe import AdvantageInputs
from learner.algorithms.table import make_algorithm
from rewards.sample import Sample
from tests.helpers.learners import a_table, make_learner, make_policy
from tests.helpers.rewarded import f64, rewarded_batch
from tests.helpers.runs import overrides, rows

ROOT = Path(__file__).parents[2]
REWARD, ALGORITHM = (ROOT / "examples" / name for name in ("my_reward.py", "my_algorithm.py"))


def early_letters(completion: str, answer: str) -> float:
    """The share of characters before "P", of which the tiny model writes some at first."""
    return sum(character < "P" for character in completion) / max(len(completion), 1)


def test_grpo_in_one_file_fits_on_a_page_and_learns(tiny_model: Path):
    source = (ROOT / "examples" / "grpo_in_one_file.py").read_text()
    assert len(source.splitlines()) <= 120
    rewards = grpo_in_one_file.train(str(tiny_model), reward=early_letters, steps=20, learning_rate=0.02)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, [round(reward, 2) for reward in rewards]


def test_its_reward_prefers_the_bare_number():
    completions = (" 7", "7\n", " 7 apples", " 8", "")
    assert [grpo_in_one_file.bare_number(text, "7") for text in completions] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "completion", "expected"),
    [
        ("contains_answer", "It is 12.", 1.0),
        ("contains_answer", "It is 112.", 0.0),
        ("brief", "any text of 64 tokens", 0.25),
        ("mentions_keywords", "A Cat sat.", 0.5),
        ("trl_no_apology", "Sorry, no.", 0.0),
        ("trl_no_apology", "Twelve.", 1.0),
    ],
)
def test_each_reward_scores_in_the_scoring_process(function: str, completion: str, expected: float):
    options = {"target": 16} if function == "brief" else {}
    terms = [TermSettings(f"{REWARD}:{function}", options=options)]
    worker = RewardWorker(terms, deadline_seconds=10.0, memory_gib=0.5, max_tokens=64)
    sample = Sample("How many?", completion, "12", tokens=64, metadata={"keywords": ["cat", "dog"]})
    assert worker.score_sample(sample) == Score(expected, {function: expected})
    worker.close()


def test_the_recipe_takes_the_median_of_each_group_as_baseline():
    batch = rewarded_batch(
        f64(1.0, 0.0, 0.25, 3.0, float("nan"), 5.0), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([1, 2, 1, 1, 1, 1])
    )
    settings = load_settings("experiment=none", f"algorithm.name={ALGORITHM}:RECIPE").algorithm
    inputs = AdvantageInputs(batch, batch.rewards_N.isfinite(), settings, {})
    advantages_A, returns_A = my_algorithm.over_median(inputs)
    # The medians are 0.25 and 4; the second trajectory has two tokens; the fifth has no reward.
    assert advantages_A.tolist() == [0.75, -0.25, -0.25, 0.0, -1.0, 0.0, 1.0]
    assert returns_A is None
    zeros_T = torch.zeros(1)
    loss_inputs = LossInputs(
        rows_T=torch.tensor([0]),
        advantages_T=torch.tensor([2.0]),
        weights_T=zeros_T,
        behavior_logprobs_T=zeros_T,
        policy_logprobs_T=torch.tensor([-3.0]),
        old_logprobs_T=zeros_T,
    )
    assert my_algorithm.log_likelihood(loss_inputs, settings).tolist() == [6.0]


def test_the_recipe_trains_the_adapter(tiny_model: Path):
    settings = load_settings("experiment=none", f"algorithm.name={ALGORITHM}:RECIPE").algorithm
    algorithm = make_algorithm(settings, max_tokens=16, term_weights={})
    learner = make_learner(make_policy(tiny_model), algorithm)
    before = learner.adapter().flat
    stats = learner.step(a_table())
    assert stats.trained_completions == 8  # the median of four rewards is none of them
    assert not torch.equal(before, learner.adapter().flat)


def test_launch_takes_the_recipe_and_the_reward_by_their_paths(tiny_model: Path, tmp_path: Path):
    arguments = overrides(
        tiny_model,
        tmp_path / "run",
        "algorithm.name=examples/my_algorithm.py:RECIPE",
        "reward.terms=[{fn: examples/my_reward.py:brief, options: {target: 2}}]",
        "run.steps=1",
    )
    subprocess.run([sys.executable, "launch.py", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]
