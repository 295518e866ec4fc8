"""Every preset composes and passes the checks; mistakes are refused before anything loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from conf.compose import load_settings
from conf.errors import UsageError
from conf.facts import ALGORITHMS, READ_WITH, TASKS, readers
from conf.fields import walk
from conf.reference import reference
from conf.schema import GROUPS, AlgorithmSettings, Settings
from conf.validate import named_terms

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
THINK = "Think step by step inside <think> and </think>, then give the final answer inside <answer> and </answer>."
PRESETS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


def refused(*overrides: str) -> str:
    """The message with which the overrides are refused."""
    with pytest.raises(UsageError) as caught:
        load_settings(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(("group", "name"), PRESETS)
def test_every_preset_composes_and_passes_the_checks(group: str, name: str):
    more = {"data": "data.source=rows.jsonl", "benchmark": "task=evaluate"}.get(group, "run.steps=1")
    settings = load_settings(f"{group}={name}", *([] if (group, name) == ("data", "chain_sum") else [more]))
    assert {setting.key for setting in walk(settings)} >= {setting.key for setting in walk(Settings())}
    if group == "algorithm":
        assert settings.algorithm.name == name


def test_algorithms_and_rewards_of_the_presets_exist():
    from learner.algorithms import table
    from rewards.registry import REGISTRY

    assert set(table.ALGORITHMS) == set(ALGORITHMS)
    assert all(recipe.has_critic == ALGORITHMS[name].has_critic for name, recipe in table.RECIPES.items())
    for group, name in PRESETS:
        if group == "reward":
            assert all(term.fn in REGISTRY for term in load_settings(f"reward={name}").reward.terms)


def test_the_promised_models_exist():
    models = {
        "smollm": ("2-135m", "2-360m", "2-1.7b", "3-3b"),
        "qwen2.5-": ("0.5b", "1.5b", "3b", "7b"),
        "qwen3-": ("0.6b", "1.7b", "4b", "8b", "30b-a3b"),
        "qwen3.5-": ("0.8b", "2b", "4b", "9b"),
        "llama-": ("3.2-1b", "3.2-3b", "3.1-8b"),
        "gemma-": ("3-270m", "3-1b", "3-4b", "3-12b", "4-e2b", "4-e4b"),
        "phi-": ("4", "4-mini"),
        "mistral-": ("7b",),
        "granite-": ("3.3-2b",),
        "olmo-": ("2-1b", "3-7b"),
        "glm-": ("4-9b",),
        "gpt-oss-": ("20b",),
    }
    promised = {name + size for name, sizes in models.items() for size in sizes}
    assert {name for group, name in PRESETS if group == "model"} == promised


def test_a_package_belongs_to_one_path():
    model = load_settings().model
    assert model.package is not None and model.package_path == model.path
    other = load_settings("model.path=someone/else").model
    assert other.package_path != other.path
    assert "model.package_path" in refused("model.package_path=null")


def test_the_quickstart_settings_belong_to_the_quickstart():
    quickstart = load_settings()
    assert (quickstart.run.name, quickstart.run.steps, quickstart.sampling.max_tokens) == ("quickstart", 24, 16)
    for overrides in (
        ["data=file", "data.source=x.csv"],
        ["model.path=x"],
        ["reward=exact"],
        ["reward.terms.0.fn=exact"],
    ):
        own = load_settings(*overrides)
        assert (own.run.name, own.run.steps) == ("default", 100) and own.sampling.max_tokens >= 256


def test_a_source_gets_no_options_of_another_task():
    gym = load_settings("data.source=reasoning_gym:gcd").data
    assert (gym.task, gym.max_prompt_tokens) == ({}, 512)
    assert load_settings("data.source=reasoning_gym:gcd", "data.task.size=9").data.task == {"size": 9}


def test_the_reward_brings_the_system_prompt_that_it_needs():
    for settings in (load_settings("reward=think"), load_settings("experiment=gsm8k")):
        assert settings.reward.system_prompt == THINK and settings.data.system_prompt is None
    assert load_settings("experiment=gsm8k", "reward=math").reward.system_prompt is None


def test_settings_that_cannot_work_together_are_named():
    tensor_parallel = ["runtime=ray", "engine.tensor_parallel_size=2"]
    load_settings(*tensor_parallel, "runtime.rollout_gpus=2", "runtime.learner_gpus=0.5")
    assert "needs 16-bit weights" in refused(*tensor_parallel, "model.quantization=nf4")
    assert "the learner does not share" in refused("runtime=ray", "engine.sleep_mode=true")
    assert "runtime.max_staleness=0" in refused("runtime.max_staleness=1", "engine.sleep_mode=true")
    assert "runtime.rollout_gpus=0.5: choose null, 2" in refused(*tensor_parallel, "runtime.rollout_gpus=0.5")
    learners = ["runtime=ray", "runtime.learner_data_parallel_size=4"]
    load_settings(*learners, "runtime.learner_shards=2")
    assert "does not divide runtime.learner_data_parallel_size=4" in refused(*learners, "runtime.learner_shards=3")
    kept = [*learners, "runtime.learner_shards=2", "learner.gradient_checkpointing=false"]
    assert "learner_shards needs layers to be computed again" in refused(*kept)
    offload = ["learner.offload_activations=true", "learner.gradient_checkpointing=false"]
    assert "leave out learner.gradient_checkpointing=false" in refused(*offload)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.group_size=1", "algorithm.group_size=1: must be at least 2"),
        ("learner.learning_rate=0", "learner.learning_rate=0.0: must be over 0"),
        ("learner.learning_rate=nan", "learner.learning_rate=nan: must be a number"),
        ("learner.adam_beta1=1.5", "learner.adam_beta1=1.5: must be under 1"),
        ("learner.adam_beta2=-0.1", "learner.adam_beta2=-0.1: must be at least 0"),
        ("learner.max_grad_norm=0", "learner.max_grad_norm=0.0: must be over 0"),
        ("hardware.threads=-2", "hardware.threads=-2: must be at least 1"),
        ("run.seed=-1", "run.seed=-1: must be at least 0"),
        ("data.held_out=0", "data.held_out=0: must be at least 1"),
        ("evaluation.max_prompts=0", "evaluation.max_prompts=0: must be at least 1"),
        ("engine.name=fast", "engine.name=fast: choose auto, vllm, transformers"),
        ("run.sinks=[wandb, excel]", "run.sinks=excel: choose wandb, trackio"),
        (
            "task=dance",
            "task=dance: choose train, generate, chat, serve, evaluate, export, difficulty, report, status, ",
        ),
        ("reward.terms=[]", "reward.terms is empty"),
        ("reward.terms=[{fn: numeric, weight: nan}]", "reward.terms[0].weight=nan: must be a number"),
        ("reward.terms=[{weight: 2}]", "reward.terms[0].fn: "),
        ("reward.terms=[{fn: numeric, name: a}, {fn: exact, name: a}]", "2 terms are named 'a'"),
        ("run.name=../../etc", "because a folder gets this name"),
        ("reward.min_scored_fraction=2", "reward.min_scored_fraction=2.0: must be at most 1"),
        ("run.resume=maybe", "choose auto, never or the number of a step"),
        ("engine.tensor_parallel_size=2", "an engine over several GPUs needs runtime=ray"),
        ("runtime.learner_gpus=2", "runtime.learner_gpus=2: choose null, 1 or a part of one, such as 0.5"),
        ("runtime.rollout_workers=2", "runtime.rollout_workers: more than 1 needs runtime=ray"),
        ("run.steps=many", "could not be converted to Integer"),
        ("algorithm=grop", "Could not find 'algorithm/grop'"),
    ],
)
def test_settings_that_cannot_work_are_named(override: str, message: str):
    assert message in refused(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.dora=true"], "serves DoRA"),
        (["algorithm=ppo", "algorithm.scale_rewards=none"], "algorithm.scale_rewards=none: ppo does not read"),
        (["algorithm=rloo", "algorithm.clip_low=0.1"], "rloo does not read"),
        (["algorithm=cispo", "algorithm.dual_clip=3"], "cispo does not read"),
        (["algorithm.ppo.gamma=0.5"], "algorithm.ppo.gamma=0.5: grpo does not read this setting, only ppo"),
        (["algorithm=ppo", "algorithm.online_dpo.beta=1"], "only online_dpo"),
        (["algorithm=online_dpo", "algorithm.kl_coefficient=0.1"], "algorithm.online_dpo.beta keeps"),
        (["algorithm=online_dpo", "algorithm.zero_variance_groups=filter"], "choose keep or resample"),
        (["algorithm.max_resampled=2"], "only algorithm.zero_variance_groups=resample"),
        (["algorithm.kl_coefficient=0.1", "algorithm.kl_estimator=k1"], "no gradient in the loss"),
        (["algorithm.kl_target=0.1"], "set algorithm.kl_coefficient over 0"),
        (["algorithm.minibatches=9", "algorithm.prompts_per_step=8"], "must be at most algorithm.prompts_per_step=8"),
        (["algorithm.normalize_terms=true", "algorithm.overlong_buffer=0.2"], "cannot be combined"),
        (["algorithm.zero_variance_groups=never"], "choose keep, filter, resample"),
        (["algorithm.scale_rewards=std"], "choose null, group, batch, none"),
        (["algorithm.name=mine"], "ppo, online_dpo, module:name"),
        (["algorithm=ppo", "algorithm.ppo.gae_lambda=1.5"], "must be at most 1"),
        (["algorithm.dual_clip=0"], "must be over 0"),
    ],
)
def test_settings_of_an_algorithm_that_would_do_nothing_are_refused(overrides: list[str], message: str):
    assert message in refused(*overrides)


def test_an_algorithm_of_the_users_own_may_read_everything():
    load_settings("algorithm.name=mine.py:RECIPE", "algorithm.ppo.gamma=0.5", "algorithm.scale_rewards=batch")


def test_the_facts_name_settings_that_exist():
    declared = set(AlgorithmSettings.__dataclass_fields__)
    assert {name for names in READ_WITH.values() for name in names} <= declared
    assert readers("group_size") == list(ALGORITHMS) and readers("ppo") == ["ppo"]


def test_terms_get_unique_names():
    terms = load_settings("reward.terms=[{fn: a.py:f}, {fn: b.py:f}, {fn: exact, name: f_2}]").reward.terms
    assert [term.name for term in named_terms(terms)] == ["f", "f_3", "f_2"]


def test_rslora_is_a_larger_alpha():
    from actors.models.families import FAMILIES
    from epiphany.adapters import lora_arguments

    llama = FAMILIES["llama"]
    plain = load_settings("model.lora.rank=16", "model.lora.alpha=32")
    scaled = load_settings("model.lora.rank=16", "model.lora.alpha=32", "model.lora.rslora=true")
    assert (lora_arguments(plain, llama)["alpha"], lora_arguments(scaled, llama)["alpha"]) == (32.0, 128.0)


def test_a_missing_source_is_named_before_torch_is_imported():
    code = (
        "import sys\nfrom conf.compose import load_settings\ntry:\n    load_settings('data=file')\n"
        "except ValueError as error:\n    print(error)\nprint('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.startswith("data.source: name a file, ") and output.endswith("False\n")


def test_every_setting_and_section_is_explained():
    assert [setting.key for setting in walk(load_settings()) if not setting.rule.help.endswith(".")] == []


def test_the_reference_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == reference(), "python -m conf.reference > docs/config.md"


def test_the_help_names_every_task():
    text = (CONF / "config.yaml").read_text()
    for task, explanation in TASKS.items():
        assert any(f"task={task}" in line and explanation in line for line in text.splitlines())
