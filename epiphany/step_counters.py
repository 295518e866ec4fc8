"""StepCounters: what happened to the groups of a step until it is trained. Knows admissions; knows no worker."""

import time
from collections.abc import Mapping

from actors.counters import WorkerCounters
from actors.replay.admission import Admission
from conf.errors import UsageError
from epiphany.report.metrics import StepNumbers


class StepCounters:
    """Counts from now on. Raises UsageError after `max_unscorable_groups` groups that could not be scored."""

    def __init__(self, *, max_unscorable_groups: int) -> None:
        self._max_unscorable_groups = max_unscorable_groups
        self._started = time.monotonic()
        self._samples = self._unscorable = self._resampled = self._unscorable_groups = 0
        self._unscorable_error: str | None = None

    def restart_clock(self) -> None:
        """Let the step begin now."""
        self._started = time.monotonic()

    def add(self, admission: Admission) -> None:
        """Count a group."""
        self._samples += admission.samples
        self._unscorable += admission.unscorable
        self._unscorable_error = admission.error or self._unscorable_error
        if admission.accepted:
            return
        if admission.zero_variance:
            self._resampled += 1
            return
        self._unscorable_groups += 1
        if self._unscorable_groups > self._max_unscorable_groups:
            raise UsageError(
                f"{self._unscorable_groups} groups in a row could not be scored; the last reason: {admission.error}"
            )

    def numbers(self, workers: Mapping[str, WorkerCounters], *, dropped: int) -> StepNumbers:
        """The numbers of the step that is done; `dropped` are groups of the whole run."""
        return StepNumbers(
            workers=workers,
            seconds=time.monotonic() - self._started,
            samples=self._samples,
            unscorable=self._unscorable,
            unscorable_error=self._unscorable_error,
            resampled=self._resampled,
            dropped=dropped,
        )
