"""A reward that rises while held-out questions are answered no better."""

from typing import Any

import pytest

from conf.schema import TermSettings
from epiphany.report.gaming import answer_terms, gamed_reward


def rows(**late: float) -> list[dict[str, Any]]:
    early = {"math": 0.4, "tags": 0.2}
    return [{"step": step, "reward_terms": {**early, **(late if step > 6 else {})}} for step in range(1, 13)]


def gamed(of_steps: list[dict[str, Any]], records: list[dict[str, Any]]) -> str | None:
    return gamed_reward(of_steps, records, checking={"math"})


def evaluations(*shares: float | None) -> list[dict[str, Any]]:
    return [{"step": 6 * i, "reward": "a", "greedy": {"lenient": share}} for i, share in enumerate(shares)]


def test_a_term_that_rises_while_no_more_answers_are_right_is_named():
    text = gamed(rows(tags=0.9, math=0.9), evaluations(0.5, 0.45))
    assert text is not None
    assert "tags rose from 0.20 to 0.90" in text and "50.0% were answered right before and 45.0% are now" in text
    assert "math" not in text


@pytest.mark.parametrize(
    ("terms", "shares"),
    [
        ({"tags": 0.9}, (0.5, 0.6)),  # answers are better, too
        ({"tags": 0.25}, (0.5, 0.45)),  # the rise is small
        ({"tags": 0.9}, (None, None)),  # nothing says what is right
        ({"tags": 0.9}, (0.5,)),  # measured once
        ({"tags": 0.9}, (1.0, 1.0)),  # nothing is left to answer better
        ({"math": 0.9}, (0.5, 0.45)),  # that is learning by heart
    ],
)
def test_otherwise_nothing_is_said(terms: dict[str, float], shares: tuple[float | None, ...]):
    assert gamed(rows(**terms), evaluations(*shares)) is None


def test_evaluations_under_another_reward_and_short_runs_are_not_compared():
    changed = [{**evaluations(0.5)[0], "reward": "b"}, *evaluations(0.4)]
    assert gamed(rows(tags=0.9), changed) is None
    assert gamed(rows(tags=0.9)[:8], evaluations(0.5, 0.4)) is None
    resumed = [{**record, "step": record["step"] + 6} for record in evaluations(0.5, 0.4)]
    assert gamed(rows(tags=0.9), resumed) is None  # the rise was before them


def test_terms_that_check_answers_are_known_by_their_functions():
    terms = [TermSettings("math"), TermSettings("math", name="again"), TermSettings("tags"), TermSettings("mine.py:f")]
    assert answer_terms(terms) == {"math", "again"}
