"""Crew: the learner's ranks as the loop sees them. All of them take each step, the first does everything else.

Knows the runtime's protocols and the learner's worker; knows neither Ray nor where rows come from.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa

from actors.runtime import Handle, Promise, Runtime, passed
from learner.stats import StepStats
from learner.worker import LearnerWorker

R = TypeVar("R")


class Crew:
    """Learners that hold the same weights. Several exchange gradients, with `seconds` for each exchange."""

    def __init__(self, runtime: Runtime, handles: Sequence[Handle[LearnerWorker]], *, seconds: float) -> None:
        self._runtime = runtime
        self._handles = handles
        self.first = handles[0]
        self._steps: list[Promise[StepStats]] = []
        if len(handles) > 1:
            host = self.first.host
            port = self.first.submit(LearnerWorker.open_store, host).result()
            self._all([h.submit(LearnerWorker.join, host, port, h.host, seconds) for h in handles])

    def resume(self, wanted: str) -> tuple[str, dict[str, Any]] | None:
        """Let every rank go on from a checkpoint (LearnerWorker.resume)."""
        return self._all([h.submit(LearnerWorker.resume, wanted) for h in self._handles])

    def hold(self, table: Promise[pa.Table]) -> None:
        """Have the rows at every rank before any of them begins: a rank without them would leave the others waiting."""
        self._all([h.submit(LearnerWorker.hold, passed(table)) for h in self._handles])

    def step(self) -> None:
        """Begin a step on the rows that are held."""
        self._steps = [h.submit(LearnerWorker.step) for h in self._handles]

    @property
    def pending(self) -> list[Promise[StepStats]]:
        """What to wait for: ranks that are still at the step."""
        there = self._runtime.wait(self._steps, 0.0)
        return [promise for promise in self._steps if promise not in there]

    @property
    def is_done(self) -> bool:
        """Whether every rank has done the step. Raises what one of them raised, for which the others wait in vain."""
        there = self._runtime.wait(self._steps, 0.0)
        for promise in there:
            promise.result()
        return len(there) == len(self._steps)

    def stats(self) -> StepStats:
        """Wait for the step. Raises WorkerLost, or what the step raised."""
        return self._all(self._steps)

    def close(self) -> None:
        for handle in self._handles:
            handle.close()

    def _all(self, promises: Sequence[Promise[R]]) -> R:
        """The first one's result once all are there. Raises what any of them raised, whichever is first to."""
        left = list(promises)
        while left:
            for promise in self._runtime.wait(left, 60.0):
                promise.result()
                left.remove(promise)
        return promises[0].result()
