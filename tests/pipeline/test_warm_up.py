"""A run that begins with demonstrations: they are learned, and a run that is killed meanwhile ends the same."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.helpers.runs import Launched, assert_bit_equal, launch, overrides, wait_for

STEPS = 4


def arguments_of(model: Path, folder: Path, *more: str) -> list[str]:
    rows = [{"question": f"{i} + 1", "answer": str(i + 1), "solution": "abc"} for i in range(20)]
    data = folder.parent / "demonstrated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warm_up = ("warmup.steps=40", "warmup.column=solution", "warmup.learning_rate=0.02")
    return overrides(model, folder, f"data.source={data}", *warm_up, *more)


@pytest.fixture(scope="module")
def warm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("warm") / "run"
    return folder, launch(arguments_of(tiny_model, folder))


def test_the_first_rollout_comes_from_what_was_learned(warm: tuple[Path, str]):
    folder, output = warm
    losses = [json.loads(line)["loss"] for line in (folder / "warmup.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]
    assert "8 demonstrations, such as 'abc', score" in output
    assert f"warmed up in 40 steps on 16 demonstrations: loss {losses[0]:.3f} to {losses[-1]:.3f}" in output
    texts = pq.read_table(folder / "completions" / "step-000001.parquet").column("text").to_pylist()
    letters = "".join(texts)
    assert len(letters) > 20 and sum(letters.count(letter) for letter in "abc") > 0.5 * len(letters), texts


@pytest.mark.parametrize("lines", [5, 40])
def test_killed_while_or_after_it_warmed_up_the_run_ends_bit_equal(
    warm: tuple[Path, str], tiny_model: Path, tmp_path: Path, lines: int
):
    folder = tmp_path / "run"
    arguments = arguments_of(tiny_model, folder)
    running = Launched(arguments, tmp_path / "log")
    log = folder / "warmup.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= lines)
    running.kill()
    launch(arguments)
    assert_bit_equal(folder, warm[0], STEPS)


def test_ctrl_c_while_it_warms_up_keeps_nothing_of_it(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    running = Launched(arguments_of(tiny_model, folder, "warmup.steps=100000"), tmp_path / "log")
    wait_for((folder / "warmup.jsonl").exists)
    os.kill(running.pid, signal.SIGINT)
    code, output = running.wait()
    assert code == 130 and "saved" not in output, output
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["warmup.column=none"], "warmup.column=none: no training row has a demonstration there"),
        (["warmup.column=null"], "all 8 demonstrations are over sampling.max_tokens=6"),
        (
            ["warmup.column=null", "reward.terms=[{fn: gym}]"],
            "do not get the full score of this reward (no term applies); name",
        ),
        (["warmup.steps=0"], "warmup.column=solution: nothing reads this unless warmup.steps is over 0"),
    ],
)
def test_a_warm_up_without_demonstrations_is_refused(tiny_model: Path, tmp_path: Path, more: list[str], message: str):
    output = launch(arguments_of(tiny_model, tmp_path / "run", *more), expect=2)
    assert message in output
