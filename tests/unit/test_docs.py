"""What the docs say can be run: settings that they name exist, and commands compose."""

import re
import shlex
from pathlib import Path

import pytest

from conf.compose import load_settings
from conf.fields import walk
from conf.schema import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "gallery" / "README.md"]
KEYS = [setting.key for setting in walk(Settings())]
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})
KNOWN = {*KEYS, *(key.rpartition(".")[0] for key in KEYS)}
SETTING = re.compile(rf"`((?:{'|'.join(SECTIONS)})(?:\.[a-z_0-9]+)+)[=`]")
UNSLOTH = ROOT / "docs" / "coming_from.md"
# What looks like settings of ours: files, and the words of others.
OTHERS = {
    *(
        "metrics.jsonl",
        "evaluations.jsonl",
        "warmup.jsonl",
        "report.html",
        "rewards.log",
        "model.gguf",
        "model.save_lora",
    ),
    *("algorithm.adv_estimator", "data.max_prompt_length", "data.max_response_length", "data.train_batch_size"),
}
# Below these, keys are those of a reasoning-gym task.
OPEN = ("data.task.", "data.held_out_task.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page: Path):
    named = set(SETTING.findall(page.read_text())) - OTHERS
    assert {name for name in named if name not in KNOWN and not name.startswith(OPEN)} == set()


def test_the_notebook_of_unsloth_in_our_words_composes():
    block = re.search(r"```\n(python launch\.py run\.name=first.*?)```", UNSLOTH.read_text(), re.DOTALL)
    assert block is not None
    first = block[1].replace("\\\n", " ").splitlines()[0]
    settings = load_settings(*shlex.split(first)[2:])
    assert settings.algorithm.group_size == 8 and len(settings.reward.terms) == 3
