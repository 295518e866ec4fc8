"""Metrics of a run: metrics.jsonl (one line a step), TensorBoard files beside it, and completions as Parquet."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class MetricsLog:
    """Appends one line a step. Lines and curves after `last_step` (of a run that died after its checkpoint) go."""

    def __init__(self, file: Path, tensorboard: Path, *, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._file = file
        kept = [row for row in read(file) if row["step"] <= last_step]
        scratch = file.with_suffix(".writing")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))
        scratch.rename(file)
        self._writer = SummaryWriter(str(tensorboard), purge_step=last_step + 1 if last_step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        """`row` holds `step`; nested mappings become curves named a/b."""
        with self._file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in _flatten(row):
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a line cut short at the end is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_completions(folder: Path, step: int, table: pa.Table) -> None:
    """The rows that trained `step`, as step-<n>.parquet."""
    scratch = folder / ".writing"
    pq.write_table(table, scratch)
    scratch.rename(folder / f"step-{step:06d}.parquet")


def _flatten(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in row.items():
        flat += _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return flat
