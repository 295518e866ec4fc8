"""Recorder: what a step leaves behind, written where the rows are at hand."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from learner.stats import StepStats
from report import metrics
from report.diagnosis import Diagnosis


class Recorder:
    """Writes metrics and completions of each step. Lines after `last_step`, of a run that died, go."""

    def __init__(self, file: Path, tensorboard: Path, completions: Path, *, last_step: int) -> None:
        self._log = metrics.MetricsLog(file, tensorboard, last_step=last_step)
        self._completions = completions
        self._diagnosis = Diagnosis(metrics.read(file))

    def record(self, table: pa.Table, stats: StepStats, version: int, numbers: dict[str, Any]) -> dict[str, Any]:
        """Write the step that made `version`, and return its line; `numbers` are those of metrics.step_row."""
        row = metrics.step_row(table, stats, version=version, **numbers)
        row["warnings"] = self._diagnosis.add(row)
        self._log.write(row)
        metrics.write_completions(self._completions, version, table)
        return row

    def close(self) -> None:
        self._log.close()
