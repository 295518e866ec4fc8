"""What a person sees: the live table, activities, durations, the status of a run and the end of a sweep."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from epiphany.report import activity
from epiphany.report.columns import columns, fitting, header_lines
from epiphany.report.sweep import show_sweep
from epiphany.report.table import LiveTable, duration
from tests.helpers.step_numbers import WORKERS

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
    assert "unscored" in fitting([columns({**wide, "unscorable": 3}, 100, "1s")], 80)
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


def test_a_sweep_ends_with_its_runs_beside_each_other(tmp_path: Path):
    evaluations = {
        "a": {"greedy": {"lenient": 0.25, "reward": 0.25}, "sampled": {"lenient": 0.125, "reward": 0.0}},
        "b": {"greedy": {"lenient": 0.75, "reward": 0.75}},
        "c": {"greedy": {"lenient": None, "reward": 0.5}},
    }
    for name, evaluation in evaluations.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluations.jsonl").write_text(json.dumps({"step": 8, **evaluation}) + "\n")
    out = io.StringIO()
    show_sweep(Console(file=out, width=80), [tmp_path / name for name in ("a", "b", "c", "died")])
    assert [line.split() for line in out.getvalue().splitlines()[2:]] == [
        ["b", "8", "75.0%", "right", "-"],
        ["c", "8", "mean", "reward", "0.500", "-"],
        ["a", "8", "25.0%", "right", "12.5%", "right"],
        ["died", "-", "-", "-"],
    ]
