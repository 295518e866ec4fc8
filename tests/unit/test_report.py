"""What a run leaves and shows: evaluations by hand, rows of metrics, sinks, the run folder, and the tables."""

import dataclasses
import io
import json
import os
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.types import Group, Score
from conf.errors import UsageError
from epiphany.report import activity, evaluation, metrics, sinks
from epiphany.report.columns import columns, fitting, header_lines
from epiphany.report.recorder import Recorder
from epiphany.report.run_folder import Layout, RunFolder, RunFolderError, disk_errors
from epiphany.report.status import show_status
from epiphany.report.table import LiveTable, duration, show_evaluations
from learner.metrics import StepStats
from tests.helpers.rollouts import group, table

# Evaluation


def groups_of(*scores: Sequence[Score]) -> list[Group]:
    unscored = [group(ordinal, [None] * len(of_prompt)) for ordinal, of_prompt in enumerate(scores)]
    return [dataclasses.replace(g, scores=tuple(s)) for g, s in zip(unscored, scores, strict=True)]


def checked(*answers: list[tuple[float, float]]) -> list[Group]:
    """Groups with these (strict, lenient)."""
    return groups_of(*([Score(lenient, strict=strict, lenient=lenient) for strict, lenient in a] for a in answers))


def test_the_share_of_right_answers_by_hand():
    summary = evaluation.summarize(checked([(1, 1), (0, 1)], [(0, 0), (0, 1)]))
    assert (summary.strict, summary.lenient, summary.prompts, summary.samples) == (0.25, 0.75, 2, 2)
    assert (summary.reward, summary.unscorable, summary.mean_tokens) == (0.75, 0, 1.5)


def test_unscorable_answers_are_left_out_and_counted():
    lost = Score(None, error="x")
    summary = evaluation.summarize(groups_of([Score(1.0, strict=1.0, lenient=1.0), lost], [lost, lost]))
    assert (summary.strict, summary.lenient, summary.reward, summary.unscorable) == (1.0, 1.0, 1.0, 3)
    nothing = evaluation.summarize(groups_of([lost, lost]))
    assert (nothing.lenient, nothing.reward, nothing.unscorable) == (None, None, 2)


def test_a_reward_that_checks_no_answer_has_a_mean_and_its_interval():
    summary = evaluation.summarize(groups_of([Score(-1.0), Score(0.0)], [Score(0.5), Score(0.5)]))
    assert (summary.strict, summary.lenient, summary.low, summary.high) == (None, None, None, None)
    # Means of prompts -0.5 and 0.5: mean 0, deviation sqrt(0.5), half width 1.96 sqrt(0.5) / sqrt(2) = 0.98.
    assert summary.reward == 0.0
    assert (summary.reward_low, summary.reward_high) == (pytest.approx(-0.98, abs=1e-4), pytest.approx(0.98, abs=1e-4))
    alone = evaluation.summarize(groups_of([Score(-0.4)]))
    assert (alone.reward, alone.reward_low) == (-0.4, None)


def test_wilson_interval_by_hand():
    # 8 of 10 at 95 %: Wilson's interval is 0.490 to 0.943 (Brown, Cai and DasGupta 2001 give the formula).
    low, high = evaluation.wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert evaluation.wilson(0.0, 5)[0] == pytest.approx(0) and evaluation.wilson(1.0, 5)[1] == pytest.approx(1)


def test_best_constant():
    assert evaluation.best_constant(["1", "2", "2", None]) == ("2", 0.5)
    assert evaluation.best_constant([None]) == ("", 0.0)


def recorded(step: int, groups: list[Group], reward: str = "numeric") -> dict[str, Any]:
    summary = evaluation.summarize(groups)
    return dict(evaluation.record(step, summary, None, ("[/7]", 0.5), seconds=1.0, reward=reward))


def test_an_evaluation_keeps_its_answers(tmp_path: Path):
    greedy, sampled = checked([(1, 1)], [(0, 1)]), checked([(1, 1), (0, 0)])
    evaluation.save(Layout(tmp_path), recorded(3, greedy), greedy, sampled, temperature=0.5)
    rows = pq.read_table(tmp_path / "evaluations" / "step-000003.parquet").to_pylist()
    assert [(r["ordinal"], r["sample"], r["temperature"]) for r in rows] == [
        (0, 0, 0.0),
        (1, 0, 0.0),
        (0, 0, 0.5),
        (0, 1, 0.5),
    ]
    assert {key: rows[1][key] for key in ("question", "reference", "completion", "reward", "strict", "error")} == {
        "question": "q",
        "reference": "1",
        "completion": "text",
        "reward": 1.0,
        "strict": 0.0,
        "error": None,
    }
    assert [row["step"] for row in metrics.read(tmp_path / "evaluations.jsonl")] == [3]


def shown_evaluations(*records: dict[str, Any], width: int = 160) -> str:
    out = io.StringIO()
    show_evaluations(Console(file=out, width=width), records)
    return out.getvalue()


def test_the_table_before_and_after():
    groups = checked([(1, 1)], [(0, 1)])
    text = shown_evaluations(*(recorded(step, groups) for step in (0, 9)))
    assert "greedy before, step 0" in text and "greedy after, step 9" in text
    assert "100.0% (34.2 to 100.0%)   50.0%" in text and "right" in text and "best constant answer ('[/7]')" in text
    assert "…" not in shown_evaluations(*(recorded(step, groups) for step in (0, 1000)), width=80)


def test_the_table_of_a_users_own_reward_shows_its_mean_and_nothing_of_right():
    groups = groups_of([Score(-1.0)], [Score(0.2)], [Score(None, error="x")])
    text = shown_evaluations(*(recorded(step, groups) for step in (0, 9)))
    assert "mean reward" in text and "-0.400 (-1.576 to 0.776)" in text
    assert "right" not in text and "best constant" not in text
    assert "step 9: 1 completions could not be scored" in text
    line = evaluation.one_line(recorded(9, groups))
    assert line == "evaluation at step 9: greedy mean reward -0.400 (1 completions could not be scored)"


def test_only_evaluations_under_the_same_reward_are_compared():
    groups = checked([(1, 1)])
    text = shown_evaluations(recorded(0, groups, "math"), recorded(5, groups), recorded(9, groups))
    assert "before, step 5" in text and "after, step 9" in text
    assert "left out: evaluations under another reward (step 0)" in text
    assert "now, step 9" in shown_evaluations(recorded(0, groups, "math"), recorded(9, groups))


# Rows of metrics

WORKERS: dict[str, Any] = {
    "rollout-0": {"in_flight": 3, "restarts": 0, "version": 1, "tokens_per_second": 100.0, "seconds": 1.0},
    "reward-0": {"in_flight": 1, "restarts": 2},
}
NUMBERS = metrics.StepNumbers(WORKERS, seconds=1.0, unscorable=0, resampled=0, dropped=0)


def trained(**changes: Any) -> StepStats:
    return StepStats(**{"version": 1, "trained_tokens": 5, "stream_tokens": 50, "seconds": 0.5, **changes})


def test_a_row_tells_what_was_measured():
    row = metrics.step_row(table([group(0, [1.0, 0.0]), group(1, [1.0, 1.0])]), trained(entropy=0.7), NUMBERS)
    assert (row["step"], row["reward"], row["zero_variance_share"]) == (1, 0.75, 0.5)
    assert (row["entropy"], row["learner_tokens_per_second"], row["learner_seconds"]) == (0.7, 100.0, 0.5)
    assert (row["rollout_tokens_per_second"], row["staleness"], row["staleness_max"]) == (100.0, 0.0, 0)


def test_what_was_not_measured_is_none_and_shown_as_a_dash():
    rows = table([group(0, [1.0, 1.0])])
    idle = dataclasses.replace(NUMBERS, workers={"rollout-0": {**WORKERS["rollout-0"], "seconds": 0.0}})
    row = metrics.step_row(rows, StepStats(version=1, seconds=0.1, learning_rate=1e-4), idle)
    names = ("entropy", "logprob_gap", "capped_share", "loss", "grad_norm", "learner_tokens_per_second")
    assert {row[name] for name in (*names, "rollout_tokens_per_second", "rollout_seconds")} == {None}
    assert row["learning_rate"] == 1e-4
    cells = columns(row, 10, "")
    shown = ("entropy", "logprob gap", "learner tok/s", "rollout tok/s", "kl")
    assert {cells[name] for name in shown} == {"-"}


def test_the_most_frequent_best_answer():
    texts = [["7", "x"], [" 7", "7"], ["7\n", "x"], ["8", "7"]]
    groups = []
    for ordinal, of_prompt in enumerate(texts):
        g = group(ordinal, [1.0, 0.0])
        named = [dataclasses.replace(t, text=x) for t, x in zip(g.trajectories, of_prompt, strict=True)]
        groups.append(dataclasses.replace(g, trajectories=tuple(named)))
    row = metrics.step_row(table(groups), trained(), NUMBERS)
    assert (row["constant_text"], row["constant_share"]) == ("7", 0.75)
    few = metrics.step_row(table(groups[:3]), trained(), NUMBERS)
    assert (few["constant_text"], few["constant_share"]) == ("", None)


def test_completions_begin_with_what_people_read(tmp_path: Path):
    rows = pa.table({"worker": ["w"], "text": ["7"], "reference": ["8"], "question": ["3 + 4"], "ordinal": [1]})
    metrics.write_step_table(tmp_path / "completions", 2, rows)
    written = pq.read_table(tmp_path / "completions" / "step-000002.parquet")
    assert written.column_names == ["ordinal", "question", "reference", "text", "worker"]


def test_a_file_of_rows_is_read_up_to_the_first_damage(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    for damage in (b'{"step": 3, "rew', b"[3]\n", b"\xff\xfe\n", b'{"reward": 1}\n'):
        file.write_bytes(b'{"step": 1}\n{"step": 2}\n' + damage)
        assert [row["step"] for row in metrics.read(file)] == [1, 2]
    assert metrics.read(tmp_path / "none") == []


# Sinks


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
    notes = [recording.record(rows, trained(version=step), NUMBERS)["notes"] for step in (1, 2, 3)]
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
    (note,) = recording.record(table([group(0, [1.0, 0.0])]), trained(), NUMBERS)["notes"]
    assert "no login" in note


def test_rows_of_a_run_that_died_after_its_checkpoint_are_removed(tmp_path: Path):
    recording, rows = recorder(tmp_path), table([group(0, [1.0, 0.0])])
    for step in (1, 2, 3):
        recording.record(rows, trained(version=step), NUMBERS)
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

        return types.SimpleNamespace(init=init, log=log, finish=lambda: None)

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module(name))
    rows = table([group(0, [1.0, 0.0])])
    for last_step in (0, 1):
        recording = recorder(tmp_path, "wandb", "trackio", last_step=last_step)
        recording.record(rows, trained(version=last_step + 1), NUMBERS)
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


# The run folder

IDENTITY = {"algorithm.group_size": 4, "the training prompts": "0123abcd", "the base model's weights": "beef"}


def claim(path: Path, identity: dict[str, Any], settings: dict[str, Any], resume: str = "auto") -> list[str]:
    folder = RunFolder(path)
    try:
        return folder.claim(identity, settings, resume=resume)
    finally:
        folder.close()


def test_another_run_is_refused_with_values_and_without_hashes(tmp_path: Path):
    claim(tmp_path, IDENTITY, {"a": 1})
    changed = {"algorithm.group_size": 6, "the training prompts": "4567cdef", "the base model's weights": "cafe"}
    with pytest.raises(RunFolderError) as refused:
        claim(tmp_path, changed, {"a": 1})
    assert str(refused.value).splitlines()[1:] == [
        "  algorithm.group_size: 4 there, 6 now",
        "  the base model's weights have changed",
        "  the training prompts have changed",
    ]
    assert claim(tmp_path, IDENTITY, {"a": 2, "run": {"steps": 9}}) == ["changed since this run began: a: 1, now 2"]
    with pytest.raises(RunFolderError, match="holds a run already"):
        claim(tmp_path, IDENTITY, {"a": 2}, resume="never")


@pytest.mark.parametrize("garbage", [b"{", b"[]", b'{"identity": 1, "settings": 2}', b"\xff\xfe", b""])
def test_damaged_settings_are_a_sentence(tmp_path: Path, garbage: bytes):
    (tmp_path / "settings.json").write_bytes(garbage)
    with pytest.raises(RunFolderError, match=r"settings.json is damaged: choose another run.name"):
        claim(tmp_path, IDENTITY, {})
    with pytest.raises(RunFolderError, match=r"settings.json is damaged"):
        show_status(Console(), tmp_path)


@pytest.mark.parametrize("lock", [b"", b"none of yours", b"\xff\xfe"])
def test_a_damaged_lock_is_no_obstacle(tmp_path: Path, lock: bytes):
    claim(tmp_path, {}, {"run": {"steps": 3}})
    (tmp_path / "lock").write_bytes(lock)
    assert "step 0 of 3, not running" in status_of(tmp_path)
    first = RunFolder(tmp_path)
    (tmp_path / "lock").write_bytes(lock)
    with pytest.raises(RunFolderError, match="is in use by process unknown"):
        RunFolder(tmp_path)
    first.close()


def test_a_disk_that_refuses_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/run cannot be written or read \(Not a directory\): make space or"):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="No space left on device"), disk_errors(tmp_path):
        raise OSError(28, "No space left on device")


# What is shown

ROW: dict[str, Any] = {
    "step": 1,
    "reward": 0.5,
    "reward_terms": {"numeric": 0.5, "length": 1.0},
    "zero_variance_share": 0.25,
    "completion_tokens": 9.5,
    "truncated_share": 0.1,
    "entropy": 1.0,
    "reference_kl": None,
    "logprob_gap": 1e-5,
    "staleness": 0.0,
    "rollout_tokens_per_second": 100.0,
    "learner_tokens_per_second": 50.0,
    "seconds": 1.0,
    "warnings": {},
    "workers": WORKERS,
}


def shown(*rows: dict[str, Any], terminal: bool, width: int = 200, height: int = 40, steps: int = 10) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=height)
    with LiveTable(console, steps=steps) as live:
        for row in rows:
            live.step(row)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_is_shown_on_a_terminal_and_elsewhere(terminal: bool):
    text = shown(ROW, {**ROW, "step": 2}, terminal=terminal)
    assert "2/10" in text and "signal" in text and "numeric" in text and "25%" in text
    assert ("\x1b" in text) == terminal
    assert ("rollout-0" in text and "in flight" in text) == terminal


def test_the_columns_that_matter_fit_80_and_more_come_with_the_width():
    wide = {**ROW, "step": 10000, "completion_tokens": 1234.5, "seconds": 123.45, "reference_kl": 0.1}
    cells = [columns(wide, 10000, "12h59m")]
    matter = ["step", "reward", "no signal", "tokens", "truncated", "entropy", "logprob gap", "step s", "eta"]
    assert fitting(cells, 80) == matter
    assert set(fitting(cells, 100)) > set(matter)
    assert set(fitting(cells, 200)) == set(cells[0]) - {"unscored"}
    assert "unscored" in fitting([columns({**wide, "unscorable": 3}, 100, "1s")], 90)
    assert fitting([columns(ROW, 10, "")], 200).count("kl") == 0
    assert header_lines("no signal") == ["no", "signal"] and header_lines("step s") == ["step s"]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("height", [12, 24])
def test_nothing_is_cut(width: int, height: int):
    rows = [{**ROW, "step": step, "warnings": {"no_signal": "a " * 60}} for step in range(1, 31)]
    text = shown(*rows, terminal=True, width=width, height=height, steps=30)
    assert "…" not in text and "..." not in text
    assert "30/30" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_what_goes_wrong_is_said_once(terminal: bool):
    rows = [
        {**ROW, "step": step, "warnings": {"no_signal": "take other prompts"} if step > 1 else {}} for step in (1, 2, 3)
    ]
    text = shown(*rows, terminal=terminal)
    assert "no signal: take other prompts" in text
    assert terminal or text.count("take other prompts") == 1


def test_notes_of_the_recorder_are_shown():
    assert "a line of it" in shown({**ROW, "notes": ["a line of it"]}, terminal=False)


@pytest.mark.parametrize("with_table", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_activity_is_seen_while_it_lasts(monkeypatch: pytest.MonkeyPatch, terminal: bool, with_table: bool):
    monkeypatch.setattr(activity, "LINE_SECONDS", 0.01)
    refreshed = threading.Event()

    class Out(io.StringIO):
        def write(self, text: str, /) -> int:
            if self.getvalue().count("loading the model") >= 2:
                refreshed.set()
            return super().write(text)

    out = Out()
    live = LiveTable(Console(file=out, force_terminal=terminal, width=80), steps=3)
    if with_table:
        live.__enter__()
        live.step(ROW)
    with pytest.raises(ZeroDivisionError), live.activity("loading the model"):
        assert refreshed.wait(10.0)
        raise ZeroDivisionError
    live.step({**ROW, "step": 2})
    live.close()
    assert "loading the model" not in out.getvalue().splitlines()[-1]


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 60, 725.2, 3600, 11100)] == [
        "0s",
        "59s",
        "1m00s",
        "12m05s",
        "1h00m",
        "3h05m",
    ]


def status_of(folder: Path) -> str:
    out = io.StringIO()
    show_status(Console(file=out, width=200), folder)
    return out.getvalue()


def test_the_status_of_a_run_folder(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.claim({}, {"run": {"steps": 7}}, resume="auto")
    assert f"step 0 of 7, running as process {os.getpid()}; checkpoint none" in status_of(folder.path)
    folder.metrics.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "step": 2}) + "\n")
    text = status_of(folder.path)
    assert "step 2 of 7" in text and "the last step ended" in text and "reward 0.500" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["rollout-0", "100", "3", "1", "0"],
        ["reward-0", "-", "1", "-", "2"],
    ]
    folder.metrics.write_text('{"step": 2}\n')
    assert "reward -" in status_of(folder.path)
    folder.close()
    with pytest.raises(UsageError, match="holds no run"):
        show_status(Console(), tmp_path)
