"""What Replay lets in: rows that agree with themselves."""

import pytest

from actors.schema import SCHEMA, RowError, to_batch, validate
from tests.rollouts import group


def corrupted(column: str, value: object, row: int = 1):
    import pyarrow as pa

    rows = to_batch(group(7, [1.0, 0.0])).to_pylist()
    rows[row][column] = value
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def test_a_group_becomes_rows():
    rows = to_batch(group(7, [1.0, None], prompt=[2, 3])).to_pylist()
    assert [r["ordinal"] for r in rows] == [7, 7]
    assert [r["token_ids"] for r in rows] == [[2, 3, 5], [2, 3, 6, 6]]
    assert [r["reward"] for r in rows] == [1.0, None]
    validate(to_batch(group(7, [1.0, None])))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("behavior_logprobs", [-1.0], "1 behavior_logprobs for 2 tokens"),
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
        validate(corrupted(column, value))
