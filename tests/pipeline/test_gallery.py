"""The gallery: every problem composes, its data are read, and its reward finds the right answers."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import conf
from conf.compose import to_settings
from conf.schema import Settings, register
from conf.validate import check_settings
from epiphany.reward_check import check_reward
from epiphany.rows import read_rows
from tests.helpers.runs import ROOT, rows

GALLERY = ROOT / "examples" / "gallery"
NAMES = sorted(file.stem for file in (GALLERY / "experiment").glob("*.yaml"))


def settings_of(name: str) -> Settings:
    register()
    searched = f"hydra.searchpath=[file://{GALLERY}]"
    with initialize_config_dir(str(Path(str(conf.__file__)).parent), version_base="1.3"):
        config: DictConfig = compose("config", [searched, f"experiment={name}"])
    settings = to_settings(config)
    check_settings(settings)
    return settings


@pytest.mark.parametrize("name", NAMES)
def test_reference_answers_get_what_the_reward_says(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    settings, lines = settings_of(name), []
    check_reward(settings, read_rows(settings), lines.append)
    assert len(lines) == 1 and lines[0].startswith("reward: ")  # none that does not get the full score
    assert settings.run.name == name


def test_the_page_lists_them_all():
    page = (GALLERY / "README.md").read_text()
    assert len(NAMES) == 10 and all(f"[{name}](experiment/{name}.yaml)" in page for name in NAMES)


@pytest.mark.parametrize("name", ["law", *(pytest.param(n, marks=pytest.mark.nightly) for n in NAMES if n != "law")])
def test_it_trains(name: str, tiny_model: Path, tmp_path: Path):
    command = [sys.executable, "launch.py", "--config-dir", "examples/gallery", f"experiment={name}"]
    small = [
        f"model.path={tiny_model}",
        "model.package=null",
        "engine.name=transformers",
        "hardware=cpu",
        f"run.folder={tmp_path}",
        "run.steps=1",
        "algorithm.prompts_per_step=2",
        "algorithm.group_size=4",
        "data.held_out=2",
        "data.max_prompt_tokens=900",
        "sampling.max_tokens=64",
        "evaluation.samples=0",
    ]
    subprocess.run([*command, *small], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert [row["step"] for row in rows(tmp_path)] == [1]
