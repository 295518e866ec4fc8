"""Evaluations by hand: shares, intervals, what is kept and the table before and after."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.types import Group, Score, Truncation
from conf.compose import load_settings
from epiphany.report import evaluation, metrics, scores
from epiphany.report.run_folder import Layout
from epiphany.report.table import show_evaluations
from epiphany.sampling import evaluation_sampling, training_sampling
from tests.helpers.rollouts import group


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
    low, high = scores.wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert scores.wilson(0.0, 5)[0] == pytest.approx(0) and scores.wilson(1.0, 5)[1] == pytest.approx(1)


def test_best_constant():
    assert evaluation.best_constant(["1", "2", "2", None]) == ("2", 0.5)
    assert evaluation.best_constant([None]) == ("", 0.0)


def recorded(step: int, groups: list[Group], reward: str = "numeric") -> dict[str, Any]:
    record = evaluation.record(step, groups, [], seconds=1.0, reward=reward)
    return {**record, "best_constant": {"answer": "[/7]", "share": 0.5}}


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


def test_evaluations_sample_as_training_does_but_for_what_is_set_apart():
    same = load_settings("sampling.temperature=0.9", "sampling.top_p=0.8", "sampling.top_k=20")
    assert evaluation_sampling(same) == training_sampling(same)
    apart = load_settings(
        "sampling.top_p=0.8", "evaluation.temperature=0.6", "evaluation.top_p=1", "evaluation.top_k=5"
    )
    assert evaluation_sampling(apart) == dataclasses.replace(
        training_sampling(apart), temperature=0.6, truncation=Truncation(top_k=5)
    )
