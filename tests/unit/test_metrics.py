"""The row of a step in metrics.jsonl, and tables of completions."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epiphany.report import metrics
from epiphany.report.columns import columns
from learner.metrics import StepStats
from tests.helpers.rollouts import group, table
from tests.helpers.step_numbers import NUMBERS, WORKERS, trained


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
    assert {row[name] for name in (*names, "rollout_tokens_per_second", "rollout_seconds", "preemptions")} == {None}
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


def test_whether_length_carries_the_reward():
    """Lengths 1, 2 with rewards 0, 1 and lengths 1, 2, 3 with rewards 0, 3, 0: sums of products of the deviations
    0.5 and 0, of squares 0.5 + 2 and 0.5 + 6, so that the correlation is 0.5 / sqrt(16.25).
    """
    row = metrics.step_row(table([group(0, [0.0, 1.0]), group(1, [0.0, 3.0, 0.0])]), trained(), NUMBERS)
    assert row["length_correlation"] == pytest.approx(0.5 / 16.25**0.5)
    same = metrics.step_row(table([group(0, [1.0, 1.0]), group(1, [None, 2.0])]), trained(), NUMBERS)
    assert same["length_correlation"] is None


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
