"""Each algorithm learns: a tiny model, real samples, and an optimum that is known."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from actors.engines.transformers import TransformersEngine
from actors.models.loading import load_base_model
from actors.models.source import ModelSource
from actors.models.tokenizer import load_tokenizer
from actors.rollout import RolloutWorker
from actors.types import Group, Prompt, Sampling, Score
from benchmarks.common import sample_groups
from learner.algorithms.table import ALGORITHMS
from tests.helpers.learners import LORA, make_learner, make_policy
from tests.helpers.presets import algorithm
from tests.helpers.rollouts import table

STEPS, PROMPTS, GROUP, TOKENS = 60, 4, 8, 3


def judged(group: Group) -> Group:
    """The share of even tokens: half of them at first, all of them at best."""
    shares = [mean(token % 2 == 0 for token in trajectory.token_ids) for trajectory in group.trajectories]
    return replace(group, scores=tuple(Score(share, {}) for share in shares))


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.nightly), pytest.param(2, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_reaches_the_optimum(tiny_model: Path, name: str, seed: int):
    """At least 0.95 of 1 within 60 steps of 32 completions, on every seed.

    How far a run gets depends on rounding, and so on the number of threads: with one thread, online_dpo with seed 2
    reaches 0.948 and fails.
    """
    source = ModelSource(str(tiny_model), None, "test")
    model = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    worker = RolloutWorker(TransformersEngine(model, tokenizer, lora=LORA, eos_token_ids=[]), seed=seed)
    # KL in the reward would move the optimum.
    without_kl = algorithm(name, max_tokens=TOKENS, kl_coefficient=0.0)
    learner = make_learner(make_policy(tiny_model), without_kl, learning_rate=0.02)
    with torch.no_grad():
        learner.policy.lora.flat[learner.policy.lora.layout.start_of_b :].zero_()
    rewards = []
    for step in range(STEPS):
        worker.load_adapter(learner.adapter())
        prompts = [Prompt(step * PROMPTS + i, "", (40 + i, 50, 60), "", None, "") for i in range(PROMPTS)]
        groups = [judged(group) for group in sample_groups(worker, prompts, Sampling(1.0, TOKENS), GROUP)]
        rewards.append(mean(score.reward or 0.0 for group in groups for score in group.scores))
        learner.step(table(groups))
    assert rewards[0] < 0.7 and mean(rewards[-5:]) >= 0.95, [round(r, 2) for r in rewards]
