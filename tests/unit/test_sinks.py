"""Sinks: JSONL and TensorBoard after a death, wandb and trackio, and those that fail."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import UsageError
from epiphany.report import metrics, sinks
from epiphany.report.recorder import Recorder
from epiphany.report.run_folder import Layout
from tests.helpers.rollouts import group, table
from tests.helpers.step_numbers import NUMBERS, trained

NONE = np.full(3, np.nan, dtype=np.float32)  # no log-probability of the learner, of three tokens


class Failing:
    """A sink that raises in the second step."""

    def __init__(self, options: sinks.SinkOptions) -> None:
        self.closed = False

    def write(self, row: metrics.Row) -> None:
        if row["step"] == 2:
            raise ConnectionError("no network")

    def close(self) -> None:
        self.closed = True
        raise ConnectionError("no network")


def recorder(folder: Path, *names: str, last_step: int = 0) -> Recorder:
    paths = Layout(folder)
    files = paths.metrics, paths.tensorboard, paths.completions
    return Recorder(*files, last_step=last_step, sinks=names, run_name="mine")


def test_a_sink_that_fails_is_dropped_with_a_line_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sinks.SINKS, "failing", Failing)
    recording, rows = recorder(tmp_path, "failing"), table([group(0, [1.0, 0.0])])
    notes = [recording.record(rows, NONE, trained(version=step), NUMBERS)["notes"] for step in (1, 2, 3)]
    recording.close()
    assert notes[0] == notes[2] == []
    assert notes[1] == [
        "metrics no longer go to failing, which failed (ConnectionError: no network); the run continues without it"
    ]
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_sink_that_cannot_be_opened_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(options: sinks.SinkOptions) -> Failing:
        raise ConnectionError("no login")

    monkeypatch.setitem(sinks.SINKS, "failing", fail)
    recording = recorder(tmp_path, "failing")
    (note,) = recording.record(table([group(0, [1.0, 0.0])]), NONE, trained(), NUMBERS)["notes"]
    assert "no login" in note


def test_rows_of_a_run_that_died_after_its_checkpoint_are_removed(tmp_path: Path):
    recording, rows = recorder(tmp_path), table([group(0, [1.0, 0.0])])
    for step in (1, 2, 3):
        recording.record(rows, NONE, trained(version=step), NUMBERS)
    recording.close()
    recorder(tmp_path, last_step=1).close()
    assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1]


def test_an_unknown_sink_and_a_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match=r"run.sinks=mlflow: choose from wandb, trackio"):
        recorder(tmp_path, "mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"needs the package wandb: install it \(pip install wandb\)"):
        recorder(tmp_path, "wandb")


def test_wandb_and_trackio_get_each_number_and_continue_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    def module(name: str) -> types.SimpleNamespace:
        def log(numbers: dict[str, float], step: int) -> None:
            calls.append((name, {"step": step, "reward": numbers["reward"], "term": numbers["reward_terms/numeric"]}))

        def init(**arguments: Any) -> types.SimpleNamespace:
            calls.append((name, arguments))
            return types.SimpleNamespace(id="abc", log=log, finish=lambda: None)

        spec = types.SimpleNamespace(origin="here")
        return types.SimpleNamespace(init=init, log=log, finish=lambda: None, __spec__=spec)

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module(name))
    rows = table([group(0, [1.0, 0.0])])
    for last_step in (0, 1):
        recording = recorder(tmp_path, "wandb", "trackio", last_step=last_step)
        recording.record(rows, NONE, trained(version=last_step + 1), NUMBERS)
        recording.close()
    same = {"project": "epiphany", "name": "mine"}
    wandb = {**same, "resume": "allow", "dir": str(tmp_path)}
    logged = {"reward": 0.5, "term": 0.5}
    assert calls == [
        ("wandb", {**wandb, "id": None}),
        ("trackio", {**same, "resume": "never"}),
        ("wandb", {"step": 1, **logged}),
        ("trackio", {"step": 1, **logged}),
        ("wandb", {**wandb, "id": "abc"}),
        ("trackio", {**same, "resume": "allow"}),
        ("wandb", {"step": 2, **logged}),
        ("trackio", {"step": 2, **logged}),
    ]
