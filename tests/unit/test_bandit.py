"""Each algorithm learns: a tiny model, real samples, and an optimum that is known."""

from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from actors.models import ModelSource, load_base_model, load_tokenizer
from actors.rollout import RolloutWorker
from actors.transformers_engine import TransformersEngine
from actors.types import Group, Prompt, Sampling, Score
from benchmarks.common import sample_groups
from conf.schema import LearnerSettings
from learner.learner import Learner
from learner.objectives import OBJECTIVES
from tests.presets import objective
from tests.rollouts import table
from tests.unit.test_policy import LORA, make_policy

STEPS, PROMPTS, GROUP, TOKENS = 60, 4, 8, 3


def judged(group: Group) -> Group:
    """The share of even tokens: half of them at first, all of them at best."""
    return replace(group, scores=tuple(Score(mean(t % 2 == 0 for t in c.token_ids), {}) for c in group.completions))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_algorithm_reaches_the_optimum(tiny_model: Path, name: str, seed: int):
    """At least 0.95 of 1 within 60 steps of 32 completions, on every seed."""
    source = ModelSource(str(tiny_model), None, "test")
    model = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    worker = RolloutWorker(TransformersEngine(model, tokenizer, lora=LORA, eos_token_ids=[]), seed=seed)
    # KL in the reward would move the optimum.
    without_kl = objective(name, max_tokens=TOKENS, kl_coefficient=0.0)
    learner = Learner(make_policy(tiny_model), without_kl, LearnerSettings(learning_rate=0.02))
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
