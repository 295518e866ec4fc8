"""Recorder: writes what a step leaves behind, in the process that has the rows. Knows neither console nor workers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from epiphany.report import metrics
from epiphany.report.diagnosis import Diagnosis
from epiphany.report.sinks import SinkOptions, open_sinks
from learner.metrics import StepStats


class Recorder:
    """Writes metrics to the JSONL file `file`, to `tensorboard` and to `sinks`, and rows to the folder `completions`.

    Lines after `last_step`, of a run that died after its checkpoint, are removed. Raises UsageError for a sink that is
    unknown or whose package is missing. `max_scores` are the largest rewards by source.
    """

    def __init__(
        self,
        file: Path,
        tensorboard: Path,
        completions: Path,
        *,
        last_step: int,
        sinks: Sequence[str] = (),
        run_name: str = "default",
        max_scores: Mapping[str, float | None] | None = None,
    ) -> None:
        self._max_scores = max_scores or {}
        self._sinks = open_sinks(sinks, SinkOptions(file, tensorboard, run_name, last_step))
        self._completions = completions
        self._diagnosis = Diagnosis([row for row in metrics.read(file) if row["step"] <= last_step])

    def record(
        self, table: pa.Table, logprobs_A: np.ndarray, stats: StepStats, numbers: metrics.StepNumbers
    ) -> metrics.Row:
        """Write the step that trained `table`, and return its row for the console.

        `logprobs_A` are the learner's log-probabilities of all sampled tokens before the step, NaN for none.

        The row has `warnings` by name; `notes`, lines for the user, and `solved`, the ordinals of the groups that got
        the full score throughout, are not written. Raises DiskError if the disk does not take the completions.
        """
        row = metrics.step_row(table, stats, numbers)
        row["warnings"] = self._diagnosis.add(row)
        self._sinks.write(row)
        metrics.write_step_table(self._completions, stats.version, metrics.with_policy_logprobs(table, logprobs_A))
        return {**row, "notes": self._sinks.take_notes(), "solved": metrics.solved_ordinals(table, self._max_scores)}

    def close(self) -> None:
        self._sinks.close()
