"""The one data shape in the middle: a scored group as an Arrow RecordBatch, one row per trajectory.

What `validate` accepts is trusted by everything behind it. Knows Arrow; knows neither Ray, vLLM nor torch.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TypedDict, cast

import pyarrow as pa

from actors.types import FINISH_REASONS, Group

VERSION, VERSION_KEY = "2", b"epiphany.rollout"
TURN = pa.struct([pa.field("sampled", pa.bool_(), nullable=False), pa.field("length", pa.int32(), nullable=False)])
SPAN = pa.struct([pa.field("version", pa.int64(), nullable=False), pa.field("count", pa.int32(), nullable=False)])
SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        # The prompt, and then all turns.
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("turns", pa.list_(TURN), nullable=False),
        # Of the sampled tokens alone.
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("version_spans", pa.list_(SPAN), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=True),
        pa.field("reward_terms", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("error", pa.string(), nullable=True),
        pa.field("question", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=True),
        pa.field("text", pa.string(), nullable=False),
    ],
    metadata={VERSION_KEY.decode(): VERSION},
)
UNCHECKED = ("reward_terms", "question", "reference", "text")


class RowError(ValueError):
    """A row that contradicts itself; names the ordinal, the sample and the field."""


class _Row(TypedDict):
    ordinal: int
    sample: int
    prompt_length: int
    token_ids: Sequence[int]
    turns: Sequence[dict[str, int]]
    behavior_logprobs: Sequence[float]
    version_spans: Sequence[dict[str, int]]
    finish_reason: str
    reward: float | None


def to_batch(group: Group) -> pa.RecordBatch:
    """A scored group as rows; `token_ids` holds the prompt and the trajectory."""
    rows = [
        {
            "ordinal": group.prompt.ordinal,
            "sample": i,
            "attempt": group.attempt,
            "task": group.prompt.task,
            "worker": group.worker,
            "prompt_length": len(group.prompt.token_ids),
            "token_ids": [*group.prompt.token_ids, *trajectory.token_ids],
            "turns": [{"sampled": turn.sampled, "length": turn.length} for turn in trajectory.turns],
            "behavior_logprobs": trajectory.logprobs,
            "version_spans": [{"version": s.version, "count": s.count} for s in trajectory.version_spans],
            "finish_reason": trajectory.finish_reason,
            "reward": score.reward,
            "reward_terms": list(score.terms.items()),
            "error": score.error,
            "question": group.prompt.question,
            "reference": group.prompt.answer,
            "text": trajectory.text,
        }
        for i, (trajectory, score) in enumerate(zip(group.trajectories, group.scores, strict=True))
    ]
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def validate(batch: pa.RecordBatch) -> None:
    """Refuse rows whose lengths disagree, numbers that are not finite, unknown finish reasons. Raises RowError."""
    if not batch.schema.equals(SCHEMA, check_metadata=True):
        raise RowError(f"schema differs from version {VERSION} of a rollout")
    batch.validate(full=True)
    columns = {name: batch.column(name).to_pylist() for name in SCHEMA.names if name not in UNCHECKED}
    if len(set(columns["ordinal"])) != 1:
        raise RowError(f"a group needs rows of one ordinal, not of {sorted(set(columns['ordinal']))}")
    if columns["sample"] != list(range(batch.num_rows)):
        raise RowError(
            f"ordinal {columns['ordinal'][0]}: samples {columns['sample']} are not 0 to {batch.num_rows - 1}"
        )
    for values in zip(*columns.values(), strict=True):
        _validate_row(cast(_Row, dict(zip(columns, values, strict=True))))


def _validate_row(row: _Row) -> None:
    where = f"ordinal {row['ordinal']}, sample {row['sample']}: "
    length = len(row["token_ids"]) - row["prompt_length"]
    sampled = sum(turn["length"] for turn in row["turns"] if turn["sampled"])
    if row["prompt_length"] < 1 or length < 1:
        raise RowError(f"{where}prompt_length {row['prompt_length']} of {len(row['token_ids'])} tokens")
    if sum(turn["length"] for turn in row["turns"]) != length or any(turn["length"] < 1 for turn in row["turns"]):
        raise RowError(f"{where}turns of {[turn['length'] for turn in row['turns']]} tokens, but there are {length}")
    if any(len(list(same)) > 1 for _, same in groupby(turn["sampled"] for turn in row["turns"])) or not sampled:
        raise RowError(f"{where}turns must alternate between sampled and given tokens, with one sampled at least")
    if len(row["behavior_logprobs"]) != sampled:
        raise RowError(f"{where}{len(row['behavior_logprobs'])} behavior_logprobs for {sampled} sampled tokens")
    spans = sum(span["count"] for span in row["version_spans"])
    if spans != sampled:
        raise RowError(f"{where}version_spans cover {spans} of {sampled} sampled tokens")
    if not all(math.isfinite(x) for x in row["behavior_logprobs"]):
        raise RowError(f"{where}behavior_logprobs are not finite")
    if row["reward"] is not None and not math.isfinite(row["reward"]):
        raise RowError(f"{where}reward is {row['reward']}")
    if row["finish_reason"] not in FINISH_REASONS:
        raise RowError(f"{where}finish_reason {row['finish_reason']!r} is not one of {FINISH_REASONS}")
