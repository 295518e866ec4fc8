"""Every preset composes and passes the checks; mistakes are found before anything loads."""

from pathlib import Path

import pytest

from actors.build import lora_arguments
from benchmarks.common import settings_from
from conf.check import check_overrides, check_settings, spell_out
from conf.errors import UsageError
from conf.schema import GROUPS
from learner.objectives import OBJECTIVES
from rewards.registry import REGISTRY

CONF = Path(__file__).parents[2] / "conf"
PRESETS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "name"), PRESETS)
def test_every_preset_composes_and_passes_the_checks(group: str, name: str):
    more = ["data.source=rows.jsonl"] if (group, name) == ("data", "file") else []
    found = settings_from(f"{group}={name}", *more)
    check_settings(found)
    assert found.algorithm.name in OBJECTIVES
    assert all(term.fn in REGISTRY for term in found.reward.terms)


def test_the_models_that_are_promised_are_there():
    names = {name for group, name in PRESETS if group == "model"}
    assert names == {
        "smollm2-135m", "smollm2-360m", "smollm2-1.7b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b",
        "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "mistral-7b", "phi-4",
    }  # fmt: skip
    assert settings_from("model=phi-4").model.lora.target_modules == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("learner.learing_rate=1", "learner.learning_rate"),
        ("lr=1", None),
        ("steps=3", "run.steps"),
        ("modle=x", "model"),
        ("runtime.max_stale=1", "runtime.max_staleness"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(override: str, guess: str | None):
    with pytest.raises(UsageError, match=f"did you mean {guess}" if guess else "there is no setting lr"):
        check_overrides([override])


def test_known_keys_and_free_ones_pass():
    arguments = ["model=x", "run.steps=3", "data.task.anything=4", "reward.terms=[]", "hydra.verbose=true", "-m"]
    check_overrides(arguments)
    assert spell_out(arguments)[2] == "++data.task.anything=4"


def test_settings_that_cannot_work_together_are_named():
    spread = ["runtime=ray", "engine.tensor_parallel_size=2"]
    check_settings(settings_from(*spread, "runtime.rollout_gpus=2", "runtime.learner_gpus=0.5"))
    with pytest.raises(UsageError, match="only 16-bit weights"):
        check_settings(settings_from(*spread, "model.quantization=nf4"))
    with pytest.raises(UsageError, match="the learner has memory of its own"):
        check_settings(settings_from("runtime=ray", "engine.release_cache=true"))
    with pytest.raises(UsageError, match=r"runtime\.rollout_gpus=0\.5: choose null, 2"):
        check_settings(settings_from(*spread, "runtime.rollout_gpus=0.5"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.group_size=1", "algorithm.group_size=1: must be at least 2"),
        ("learner.learning_rate=0", "learner.learning_rate=0.0: must be over 0"),
        ("engine.name=fast", "engine.name=fast: choose auto, vllm, transformers"),
        ("reward.terms=[]", "reward.terms is empty"),
        ("reward.terms=[{fn: numeric, name: a}, {fn: exact, name: a}]", "2 terms are named 'a'"),
        ("run.name=../../etc", "for it becomes a folder's name"),
        ("reward.quorum=2", "reward.quorum=2.0"),
        ("run.resume=maybe", "choose auto, never or a step's number"),
        ("engine.tensor_parallel_size=2", "an engine over several GPUs needs runtime=ray"),
        ("runtime.learner_gpus=2", "runtime.learner_gpus=2: choose null, 1 or a share of one, as 0.5"),
    ],
)
def test_settings_that_cannot_work_are_named(override: str, message: str):
    with pytest.raises(UsageError, match=message):
        check_settings(settings_from(override))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.dora=true"], "serves DoRA"),
        (["algorithm=ppo", "algorithm.reward_scale=none"], "ppo does not normalise rewards in groups"),
        (["algorithm.kl_coefficient=0.1", "algorithm.kl_estimator=k1"], "no gradient as a loss"),
        (["algorithm.kl_target=0.1"], "kl_coefficient must be over 0"),
        (["algorithm=online_dpo", "algorithm.kl_coefficient=0.1"], "algorithm.beta holds it"),
        (["algorithm.minibatches=9", "algorithm.prompts_per_step=8"], "8 prompts to share out"),
        (["algorithm.normalise_terms=true", "algorithm.overlong_buffer=0.2"], "terms alone"),
        (["algorithm.flat_groups=never"], "choose keep, drop, resample"),
        (["algorithm.reward_scale=std"], "choose null, group, batch, none"),
        (["algorithm.gae_lambda=1.5"], "must be at most 1"),
        (["algorithm.clip_most=0"], "must be over 0"),
    ],
)
def test_settings_of_an_algorithm_that_would_do_nothing_are_refused(overrides: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        check_settings(settings_from(*overrides))


def test_rslora_is_a_larger_alpha():
    plain = settings_from("model.lora.rank=16", "model.lora.alpha=32")
    scaled = settings_from("model.lora.rank=16", "model.lora.alpha=32", "model.lora.rslora=true")
    assert (lora_arguments(plain)["alpha"], lora_arguments(scaled)["alpha"]) == (32.0, 128.0)
