"""The one data shape in the middle: a scored group as an Arrow RecordBatch, one row a completion.

What `validate` lets through is trusted by everything behind it. Knows Arrow; knows neither Ray, vLLM nor torch.
"""

import math

import pyarrow as pa

from actors.types import FINISH_REASONS, Group

VERSION = "1"
SPAN = pa.struct([pa.field("version", pa.int64(), nullable=False), pa.field("count", pa.int32(), nullable=False)])
SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("worker", pa.string(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("version_spans", pa.list_(SPAN), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=True),
        pa.field("reward_terms", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("error", pa.string(), nullable=True),
        pa.field("text", pa.string(), nullable=False),
    ],
    metadata={"epiphany.rollout": VERSION},
)


class RowError(ValueError):
    """A row that contradicts itself; names the ordinal, the sample and the field."""


def to_batch(group: Group) -> pa.RecordBatch:
    """A scored group as rows, `token_ids` being prompt and completion together."""
    rows = []
    for i, (c, score) in enumerate(zip(group.completions, group.scores, strict=True)):
        rows.append(
            {
                "ordinal": group.prompt.ordinal,
                "sample": i,
                "attempt": group.attempt,
                "task": group.prompt.task,
                "worker": group.worker,
                "prompt_length": len(group.prompt.token_ids),
                "token_ids": [*group.prompt.token_ids, *c.token_ids],
                "behavior_logprobs": c.logprobs,
                "version_spans": [{"version": s.version, "count": s.count} for s in c.version_spans],
                "finish_reason": c.finish_reason,
                "reward": score.reward,
                "reward_terms": list(score.terms.items()),
                "error": score.error,
                "text": c.text,
            }
        )
    return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)


def validate(batch: pa.RecordBatch) -> None:
    """Refuse rows whose lengths disagree, numbers that are not finite, unknown finish reasons. Raises RowError."""
    if not batch.schema.equals(SCHEMA, check_metadata=True):
        raise RowError(f"schema differs from version {VERSION} of a rollout")
    batch.validate(full=True)
    columns = {name: batch.column(name).to_pylist() for name in SCHEMA.names if name not in ("text", "reward_terms")}
    if len(set(columns["ordinal"])) != 1:
        raise RowError(f"a group needs rows of one ordinal, found {sorted(set(columns['ordinal']))}")
    if columns["sample"] != list(range(batch.num_rows)):
        raise RowError(
            f"ordinal {columns['ordinal'][0]}: samples {columns['sample']} are not 0 to {batch.num_rows - 1}"
        )
    for row in zip(*columns.values(), strict=True):
        _validate_row(dict(zip(columns, row, strict=True)))


def _validate_row(row: dict) -> None:
    where = f"ordinal {row['ordinal']}, sample {row['sample']}: "
    completion_length = len(row["token_ids"]) - row["prompt_length"]
    spans = sum(span["count"] for span in row["version_spans"])
    if row["prompt_length"] < 1 or completion_length < 1:
        raise RowError(f"{where}prompt_length {row['prompt_length']} of {len(row['token_ids'])} tokens")
    if len(row["behavior_logprobs"]) != completion_length:
        raise RowError(f"{where}{len(row['behavior_logprobs'])} behavior_logprobs for {completion_length} tokens")
    if spans != completion_length:
        raise RowError(f"{where}version_spans cover {spans} of {completion_length} tokens")
    if not all(math.isfinite(x) for x in row["behavior_logprobs"]):
        raise RowError(f"{where}behavior_logprobs are not finite")
    if row["reward"] is not None and not math.isfinite(row["reward"]):
        raise RowError(f"{where}reward is {row['reward']}")
    if row["finish_reason"] not in FINISH_REASONS:
        raise RowError(f"{where}finish_reason {row['finish_reason']!r} is not one of {FINISH_REASONS}")
