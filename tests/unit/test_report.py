"""Evaluation by hand, and the table that people read."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.types import Score
from conf.errors import UsageError
from learner.stats import StepStats
from report import evaluation, metrics
from report.run_folder import RunFolder
from report.status import show_status
from report.table import Progress, show_evaluations
from tests.rollouts import group, table


def evaluated(*answers: list[tuple[float, float]]):
    groups = []
    for ordinal, pairs in enumerate(answers):
        scores = tuple(Score(lenient, strict=strict, lenient=lenient) for strict, lenient in pairs)
        groups.append(dataclasses.replace(group(ordinal, [None] * len(pairs)), scores=scores))
    return groups


def test_accuracy_by_hand():
    found = evaluation.accuracy(evaluated([(1, 1), (0, 1)], [(0, 0), (0, 1)]))
    assert (found.strict, found.lenient, found.prompts, found.samples) == (0.25, 0.75, 2, 2)
    assert (found.reward, found.unscorable, found.mean_tokens) == (0.75, 0, 1.5)


def test_unscorable_answers_are_wrong_and_counted():
    groups = evaluated([(1, 1), (0, 1)])
    groups[0] = dataclasses.replace(groups[0], scores=(groups[0].scores[0], Score(None, error="x")))
    found = evaluation.accuracy(groups)
    assert (found.lenient, found.unscorable) == (0.5, 1)


def test_wilson_interval_by_hand():
    # 8 of 10 at 95 %: Wilson's interval is 0.490 to 0.943 (Brown, Cai and DasGupta 2001 give the formula).
    low, high = evaluation.wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert evaluation.wilson(0.0, 5)[0] == pytest.approx(0) and evaluation.wilson(1.0, 5)[1] == pytest.approx(1)


def test_best_constant():
    assert evaluation.best_constant(["1", "2", "2", None]) == ("2", 0.5)
    assert evaluation.best_constant([None]) == ("", 0.0)


ROW = {
    "step": 1, "reward": 0.5, "reward_terms": {"numeric": 0.5, "length": 1.0}, "no_signal_share": 0.25, "completion_tokens": 9.5,
    "truncated_share": 0.1, "entropy": 1.0, "reference_kl": None, "mismatch": 1e-5, "lag": 0.0,
    "rollout_tokens_per_second": 100.0, "learner_tokens_per_second": 50.0, "seconds": 1.0, "warnings": {},
    "workers": {
        "rollout-0": {"open": 3, "losses": 0, "version": 1, "tokens_per_second": 100.0, "seconds": 1.0},
        "reward-0": {"open": 1, "losses": 2},
    },
}  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_is_shown_on_a_terminal_and_elsewhere(terminal: bool):
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=terminal, width=200), steps=10) as progress:
        progress.step(ROW)
        progress.step({**ROW, "step": 2})
    text = out.getvalue()
    assert "2/10" in text and "no signal" in text and "numeric" in text and "25%" in text
    assert ("\x1b" in text) == terminal
    assert ("rollout-0" in text and "groups it has" in text) == terminal


def test_the_status_of_a_run_folder(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.claim({}, {"run": {"steps": 7}}, resume="auto")

    def status() -> str:
        out = io.StringIO()
        show_status(Console(file=out, width=200), folder.path)
        return out.getvalue()

    assert f"step 0 of 7, running as process {os.getpid()}; checkpoint none" in status()
    folder.metrics.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "step": 2}) + "\n")
    text = status()
    assert "step 2 of 7" in text and "the last step ended 0 s ago" in text and "reward 0.500" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["rollout-0", "100", "3", "1", "0"],
        ["reward-0", "1", "2"],
    ]
    with pytest.raises(UsageError, match="holds no run"):
        show_status(Console(), tmp_path)


def test_the_table_before_and_after():
    out = io.StringIO()
    accuracy = evaluation.accuracy(evaluated([(1, 1)], [(0, 1)]))
    records = [evaluation.record(step, accuracy, None, ("7", 0.5), 1.0) for step in (0, 9)]
    show_evaluations(Console(file=out, width=160), records)
    assert "greedy, before (step 0)" in out.getvalue() and "greedy, after (step 9)" in out.getvalue()
    assert "100.0%" in out.getvalue() and "best constant answer ('7')" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_what_goes_wrong_is_said_once(terminal: bool):
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=terminal, width=200), steps=10) as progress:
        for step in (1, 2, 3):
            progress.step({**ROW, "step": step, "warnings": {"no_signal": "take other prompts"} if step > 1 else {}})
    text = out.getvalue()
    assert "no signal: take other prompts" in text
    assert terminal or text.count("take other prompts") == 1


def test_the_most_frequent_best_answer():
    groups = [group(ordinal, [1.0, 0.0]) for ordinal in range(4)]
    numbers: dict[str, Any] = {
        "workers": ROW["workers"],
        "seconds": 1.0,
        "unscorable": 0,
        "resampled": 0,
        "given_up": 0,
    }
    texts = [["7", "x"], [" 7", "7"], ["7\n", "x"], ["8", "7"]]
    changed = [
        dataclasses.replace(
            one, completions=tuple(dataclasses.replace(c, text=t) for c, t in zip(one.completions, said, strict=True))
        )
        for one, said in zip(groups, texts, strict=True)
    ]
    row = metrics.step_row(table(changed), StepStats(), version=1, **numbers)
    assert (row["constant_text"], row["constant_share"]) == ("7", 0.75)
    few = metrics.step_row(table(changed[:3]), StepStats(), version=1, **numbers)
    assert (few["constant_text"], few["constant_share"]) == ("", None)
