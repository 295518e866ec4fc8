"""Metrics of a run: the row of each step, and tables of completions as Parquet.

Knows rows of the replay and statistics of the learner; sinks.py writes the rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.replay.admission import is_solved
from conf.errors import disk_errors
from epiphany.report.reward_columns import mean, reward_columns
from learner.metrics import StepStats

if TYPE_CHECKING:
    from actors.counters import WorkerCounters

# A JSON object: a line of metrics.jsonl or evaluations.jsonl.
Row = Mapping[str, Any]

# Of StepStats: what a step without a trained token has not measured.
OF_TRAINED_TOKENS = (
    "loss",
    "grad_norm",
    "logprob_gap",
    "logprob_gap_max",
    "capped_share",
    "clipped_share",
    "entropy",
    "reference_kl",
    "value_loss",
    "explained_variance",
)
# The columns that people read come first in the tables of completions.
READ_FIRST = ("ordinal", "sample", "question", "reference", "text", "reward", "reward_terms", "error", "finish_reason")


@dataclass(frozen=True)
class StepNumbers:
    """What the trainer knows of a step.

    The counters of each worker by name, the step's wall-clock `seconds`, completions that came from the reward
    (`samples`), those of them that could not be scored (`unscorable`, with the last reason), groups replaced for zero
    variance (`resampled`), and groups of the whole run that were `dropped`.
    """

    workers: Mapping[str, WorkerCounters]
    seconds: float
    samples: int
    unscorable: int
    unscorable_error: str | None
    resampled: int
    dropped: int


def step_row(table: pa.Table, stats: StepStats, numbers: StepNumbers) -> dict[str, object]:
    """The line of metrics.jsonl for the step that trained the rows of `table`.

    What was not measured is None. Staleness is counted from the version that was trained, `stats.version` - 1. Rollout
    workers sample side by side, so their rates add up.
    """
    sampling = [worker for worker in numbers.workers.values() if worker.get("seconds")]
    return {
        "step": stats.version,
        **reward_columns(table),
        **_source_columns(table),
        "unscorable": numbers.unscorable,
        "unscorable_share": numbers.unscorable / numbers.samples if numbers.samples else None,
        "unscorable_error": numbers.unscorable_error,
        "resampled": numbers.resampled,
        "dropped": numbers.dropped,
        **_rollout_columns(table, trained_version=stats.version - 1),
        "rollout_tokens_per_second": sum(w.get("tokens_per_second", 0.0) for w in sampling) if sampling else None,
        "rollout_seconds": max((w.get("seconds", 0.0) for w in sampling), default=None),
        "preemptions": sum(w.get("preemptions", 0) for w in sampling) if sampling else None,
        **_learner_columns(stats),
        "seconds": numbers.seconds,
        "workers": {name: dict(worker) for name, worker in numbers.workers.items()},
    }


def _source_columns(table: pa.Table) -> dict[str, object]:
    """What sets the sources of a batch apart; nothing if there is one."""
    sources = table.column("task").to_pylist()
    names = sorted(set(sources))
    if len(names) < 2:
        return {}
    by_source = {}
    for name in names:
        rows = table.filter(pa.array([source == name for source in sources]))
        reward = reward_columns(rows)
        by_source[name] = {
            "reward": reward["reward"],
            "reward_terms": reward["reward_terms"],
            "zero_variance_share": reward["zero_variance_share"],
            **_length_columns(rows),
            "completions": rows.num_rows,
        }
    return {"by_source": by_source}


def solved_ordinals(table: pa.Table, max_scores: Mapping[str, float | None]) -> list[int]:
    """The prompts whose whole group got the largest reward of its source."""
    rewards: dict[tuple[int, str], list[float | None]] = {}
    columns = [table.column(name).to_pylist() for name in ("ordinal", "task", "reward")]
    for ordinal, source, reward in zip(*columns, strict=True):
        rewards.setdefault((ordinal, source), []).append(reward)
    return [ordinal for (ordinal, source), group in rewards.items() if is_solved(group, max_scores.get(source))]


def _rollout_columns(table: pa.Table, *, trained_version: int) -> dict[str, object]:
    staleness = [
        trained_version - span["version"] for spans in table.column("version_spans").to_pylist() for span in spans
    ]
    return {
        **_length_columns(table),
        "staleness": mean(staleness),
        "staleness_max": max(staleness),
    }


def _length_columns(table: pa.Table) -> dict[str, object]:
    """The mean number of sampled tokens, and the share of completions that were cut off."""
    lengths = pc.list_value_length(table.column("behavior_logprobs"))  # type: ignore[attr-defined]
    return {
        "completion_tokens": pc.mean(lengths).as_py(),  # type: ignore[attr-defined]
        "truncated_share": table.column("finish_reason").to_pylist().count("length") / table.num_rows,
    }


def _learner_columns(stats: StepStats) -> dict[str, object]:
    columns = dataclasses.asdict(stats)
    del columns["version"]
    seconds = columns.pop("seconds")
    rate = stats.stream_tokens / max(seconds, 1e-9)
    if stats.trained_tokens == 0:
        columns |= dict.fromkeys(OF_TRAINED_TOKENS)
        rate = None
    return {"learner_tokens_per_second": rate, "learner_seconds": seconds, **columns}


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each with a `step`, up to the first line that is none (cut short, or damaged)."""
    rows = []
    with disk_errors(file.parent):
        text = file.read_text(errors="replace") if file.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def with_policy_logprobs(table: pa.Table, logprobs_A: np.ndarray) -> pa.Table:
    """The rows with a column `policy_logprobs` beside `behavior_logprobs`: the learner's, null where it has none."""
    behavior = table.column("behavior_logprobs").combine_chunks()
    values = pa.array(logprobs_A, mask=np.isnan(logprobs_A))
    return table.append_column("policy_logprobs", pa.ListArray.from_arrays(_offsets(behavior), values))


def _offsets(lists: pa.ListArray) -> pa.Array:
    """Where each list begins, counted from the first one."""
    return pc.subtract(lists.offsets, lists.offsets[0])  # type: ignore[attr-defined]


def write_step_table(folder: Path, step: int, table: pa.Table) -> None:
    """Write `table` as step-<n>.parquet, columns that people read first. Raises DiskError if the disk does not take
    it."""
    first = [name for name in READ_FIRST if name in table.column_names]
    scratch = folder / ".writing"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        pq.write_table(table.select([*first, *(name for name in table.column_names if name not in first)]), scratch)
        scratch.rename(folder / f"step-{step:06d}.parquet")
