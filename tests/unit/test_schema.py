"""What Replay lets in: rows that agree with themselves."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.replay.schema import SCHEMA, RowError, to_batch, validate
from tests.helpers.rollouts import group, turns_of


def corrupted(**values: object) -> pa.RecordBatch:
    """A group whose second row has these `values`."""
    rows = to_batch(group(7, [1.0, 0.0])).to_pylist()
    rows[1] |= values
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def test_a_group_becomes_rows():
    rows = to_batch(group(7, [1.0, None], prompt=[2, 3])).to_pylist()
    assert [r["ordinal"] for r in rows] == [7, 7]
    assert [r["token_ids"] for r in rows] == [[2, 3, 5], [2, 3, 6, 6]]
    assert [r["reward"] for r in rows] == [1.0, None]
    assert [r["turns"] for r in rows] == [[{"sampled": True, "length": 1}], [{"sampled": True, "length": 2}]]
    assert [(r["question"], r["reference"]) for r in rows] == [("q", "1")] * 2
    validate(to_batch(group(7, [1.0, None])))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("behavior_logprobs", [-1.0], "1 behavior_logprobs for 2 sampled tokens"),
        ("behavior_logprobs", [-1.0, float("inf")], "not finite"),
        ("version_spans", [{"version": 0, "count": 1}], "version_spans cover 1 of 2"),
        ("finish_reason", "bored", "'bored' is not one of"),
        ("reward", float("nan"), "reward is nan"),
        ("prompt_length", 0, "prompt_length 0"),
        ("prompt_length", 5, "prompt_length 5 of 5"),
        ("ordinal", 8, "rows of one ordinal"),
        ("sample", 0, "samples"),
    ],
)
def test_refuses_contradictions(column: str, value: object, message: str):
    with pytest.raises(RowError, match=message):
        validate(corrupted(**{column: value}))


def turn(sampled: bool, length: int) -> dict[str, object]:
    return {"sampled": sampled, "length": length}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([turn(True, 1)], r"turns of \[1\] tokens, but there are 2"),
        ([turn(True, 3)], r"turns of \[3\] tokens, but there are 2"),
        ([turn(True, 1), turn(False, 2)], r"turns of \[1, 2\] tokens, but there are 2"),
        ([turn(True, 2), turn(False, 0)], r"turns of \[2, 0\] tokens"),
        ([turn(True, 3), turn(False, -1)], r"turns of \[3, -1\] tokens"),
        ([], r"turns of \[\] tokens, but there are 2"),
        ([turn(True, 1), turn(True, 1)], "turns must alternate"),
        ([turn(False, 1), turn(False, 1)], "turns must alternate"),
        ([turn(False, 2)], "turns must .* with one sampled at least"),
    ],
)
def test_refuses_turns_that_do_not_fit_the_tokens(turns: list[dict[str, object]], message: str):
    with pytest.raises(RowError, match=f"ordinal 7, sample 1: {message}"):
        validate(corrupted(turns=turns))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "2 behavior_logprobs for 1 sampled tokens"),
        ({"behavior_logprobs": [-1.0]}, "version_spans cover 2 of 1 sampled tokens"),
    ],
)
def test_refuses_numbers_for_given_tokens(values: dict[str, object], message: str):
    with pytest.raises(RowError, match=message):
        validate(corrupted(turns=[turn(True, 1), turn(False, 1)], **values))


@given(
    lengths=st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=6), min_size=1, max_size=4),
    starts_sampled=st.booleans(),
)
def test_accepts_any_turns_that_alternate(lengths: list[list[int]], starts_sampled: bool):
    turns = [turns_of(*of_one, starts_sampled=starts_sampled) for of_one in lengths]
    completions = [list(range(sum(of_one))) for of_one in lengths]
    rows = to_batch(group(7, [1.0] * len(turns), completions=completions, turns=turns))
    validate(rows)
    for row, of_one in zip(rows.to_pylist(), turns, strict=True):
        assert len(row["behavior_logprobs"]) == sum(t.length for t in of_one if t.sampled)
