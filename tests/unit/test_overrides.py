"""The command line: hints for unknown keys, renamed settings, implied presets, and the folders of sweeps."""

import pytest

from conf.compose import load_settings
from conf.errors import UsageError
from conf.fields import walk
from conf.overrides import RENAMED, check_overrides, normalize_overrides, sweep_folder, wants_version
from conf.schema import Settings


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("learner.learing_rate=1", "did you mean learner.learning_rate"),
        ("lr=1", "there is no setting lr; python -m conf.reference"),
        ("steps=3", "did you mean run.steps"),
        ("modle=x", "did you mean model"),
        ("runtime.max_stale=1", "did you mean runtime.max_staleness"),
        ("algorithm.ppo.gama=1", "did you mean algorithm.ppo.gamma"),
        ("+sampling.beams=4", "no setting sampling.beams, only sampling.temperature, sampling.top_k"),
        ("++sampling.temprature=0.5", "did you mean sampling.temperature"),
        ("~sampling.beams", "no setting sampling.beams"),
        ("+notes=hello", "no setting notes"),
        ("model/lora=x", "no setting model/lora"),
        ("experiment@model=sums", "use experiment=<preset>"),
        ("reward.terms.0.weigth=2", "no setting reward.terms.0.weigth"),
        ("reward.terms=[{fn: exact, weigth: 2}]", "reward.terms: a term has no weigth; did you mean weight"),
        ("reward.terms=[{fn: exact, x: 2}]", "a term has no x, only fn, name, weight, sources, max_score, options"),
        ("reward.terms=[{fn: exact}],[{fn: exact, weigth: 2}]", "a term has no weigth"),
        ("reward.terms=[exact]", "write {fn: exact}"),
    ],
)
def test_an_unknown_key_is_refused_with_a_hint(override: str, hint: str):
    with pytest.raises(UsageError) as caught:
        check_overrides([override])
    assert hint in str(caught.value)


def test_known_keys_and_those_of_open_sections_pass():
    arguments = [
        "experiment=none",
        "run.steps=3",
        "data.task.anything=4",
        "+data.task.more=4",
        "data.held_out_task={size: 4}",
        "~data.task.size",
        "algorithm.ppo={gamma: 0.5}",
        "reward.terms=[{fn: exact, options: {anything: 1}}]",
        "reward.terms.0.weight=2",
        "reward.terms.0.options.anything=2",
        "hydra.verbose=true",
        "+hydra.job.env_set.A=1",
        "hydra/launcher=basic",
        "-m",
    ]
    check_overrides(arguments)
    check_overrides(normalize_overrides(arguments))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.clip_most=3", "algorithm.clip_most is now algorithm.dual_clip"),
        ("algorithm.gamma=0.5", "algorithm.gamma is now algorithm.ppo.gamma"),
        ("+algorithm.gamma=0.5", "algorithm.gamma is now algorithm.ppo.gamma"),
        ("algorithm.flat_groups=drop", "algorithm.flat_groups=drop is now algorithm.zero_variance_groups=filter"),
        (
            "algorithm.token_weights=whole",
            "algorithm.token_weights=whole is now algorithm.loss_aggregation=sequence_sum",
        ),
        ("algorithm.zero_variance_groups=drop", "is now algorithm.zero_variance_groups=filter"),
        ("algorithm.zero_variance_groups=keep,drop", "is now algorithm.zero_variance_groups=filter"),
    ],
)
def test_a_renamed_setting_is_refused_with_its_new_name(override: str, message: str):
    with pytest.raises(UsageError) as caught:
        check_overrides([override])
    assert message in str(caught.value)


def test_new_names_exist_and_old_ones_do_not():
    keys = {setting.key for setting in walk(Settings())}
    assert set(RENAMED.values()) <= keys and not RENAMED.keys() & keys


@pytest.mark.parametrize(
    ("arguments", "normalized"),
    [
        ([], []),
        (["algorithm=ppo", "run.steps=3"], ["algorithm=ppo", "run.steps=3"]),
        (["run=runs/x", "task=status"], ["run.folder=runs/x", "task=status"]),
        (["data.task.size=4"], ["++data.task.size=4"]),
        (["data.task={size: 4}"], ["++data.task={size: 4}"]),
        (["+data.task.size=4"], ["+data.task.size=4"]),
        (["--cfg", "job", "model=phi-4"], ["experiment=none", "model=phi-4", "--cfg", "job"]),
        (["run.steps=3", "-m", "run.seed=1,2"], ["run.steps=3", "run.seed=1,2", "-m"]),
        (["reward.terms=[{fn: exact}]"], ["experiment=none", "reward.terms=[{fn: exact}]"]),
        (["experiment=quickstart", "model=phi-4"], ["experiment=quickstart", "model=phi-4"]),
        (["data=gsm8k"], ["experiment=none", "data=gsm8k"]),
        (["data.source=x.csv"], ["experiment=none", "data=file", "data.source=x.csv"]),
        (["data=file", "data.source=x.csv"], ["experiment=none", "data=file", "data.source=x.csv"]),
        (["experiment=sums", "data.source=x.csv"], ["data=file", "experiment=sums", "data.source=x.csv"]),
    ],
)
def test_what_arguments_imply(arguments: list[str], normalized: list[str]):
    assert normalize_overrides(arguments) == normalized
    assert normalize_overrides(normalized) == normalized


def test_sweep_folders_are_named_by_their_overrides():
    first = sweep_folder("runs/x", ["learner.learning_rate=1e-4", "run.seed=3", "run.folder=runs/x", "run.name=x"])
    assert first == "runs/x/learner.learning_rate-1e-4__run.seed-3"
    assert first == sweep_folder("runs/x", ["run.seed=3", "learner.learning_rate=1e-4"])
    assert first == sweep_folder("runs/x", ["learner.learning_rate=1", "run.seed=3", "learner.learning_rate=1e-4"])
    assert sweep_folder("runs/x", []) == "runs/x/defaults"
    assert sweep_folder("runs/x", ["experiment=none", "model=phi-4"]) == sweep_folder("runs/x", ["model=phi-4"])
    assert sweep_folder("runs/x", ["experiment=none"]) != sweep_folder("runs/x", [])
    unsafe = [
        ["data.source=a b"],
        ["data.source=a_b"],
        ["data.source=a/b"],
        ["reward.terms=[{fn: a}]"],
        ["reward.terms=[(fn: a)]"],
        ["data.source=a__run.seed-1"],
        ["data.source=a", "run.seed=1"],
        ["data.source=" + "long" * 50],
        ["data.source=" + "long" * 51],
    ]
    folders = [sweep_folder("runs/x", overrides).removeprefix("runs/x/") for overrides in unsafe]
    assert len(set(folders)) == len(unsafe) and max(map(len, folders)) <= 120
    assert all(set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for folder in folders)
    # The folder is passed on as an override.
    load_settings(*(f"run.folder={sweep_folder('runs/x', overrides)}" for overrides in unsafe[:4]))


def test_version():
    assert wants_version(["--version"]) and not wants_version(["run.name=version"])


@pytest.mark.parametrize(
    "text",
    [
        "What is 2+2, and why?",
        "it's",
        "a\\",
        "\\frac{1}{2} = [x]: 'y'",
        "${run.name} and \\${x} cost $5",
        "{a: b}",
        " null ",
        "two\nlines",
        "<think>=",
    ],
)
def test_a_prompt_is_taken_as_it_is(text: str):
    assert load_settings("task=generate", f"prompt={text}").generate.prompt == text
