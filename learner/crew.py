"""Crew: the learner's ranks as the loop sees them. All of them take each step, the first does everything else.

Knows the runtime's protocols and the learner's worker; knows neither Ray nor where rows come from.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa

from actors.runtime import Handle, Promise, Runtime, WorkerLost, passed
from learner.stats import StepStats
from learner.worker import LearnerWorker

P = ParamSpec("P")
R = TypeVar("R")


class Crew:
    """Learners that hold the same weights and have `seconds` for each call, and several of them for each exchange of
    gradients. Raises WorkerLost if they are not done by then."""

    def __init__(self, runtime: Runtime, handles: Sequence[Handle[LearnerWorker]], *, seconds: float) -> None:
        self._runtime = runtime
        self._handles = handles
        self._seconds = seconds
        self.first = handles[0]
        self._steps: list[Promise[StepStats]] = []
        self._deadline = 0.0
        if len(handles) > 1:
            host = self.first.host
            port = self.first.submit(LearnerWorker.open_store, host).result()
            self._all([h.submit(LearnerWorker.join, host, port, h.host, seconds) for h in handles])

    def ask(self, method: Callable[Concatenate[LearnerWorker, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the first rank answers."""
        return self._all([self.first.submit(method, *args, **kwargs)])

    def resume(self, wanted: str) -> tuple[str, dict[str, Any]] | None:
        """Let every rank go on from a checkpoint (LearnerWorker.resume)."""
        return self._all([h.submit(LearnerWorker.resume, wanted) for h in self._handles])

    def hold(self, table: Promise[pa.Table]) -> None:
        """Have the rows at every rank before any of them begins: a rank without them would leave the others waiting."""
        self._all([h.submit(LearnerWorker.hold, passed(table)) for h in self._handles])

    def step(self) -> None:
        """Begin a step on the rows that are held."""
        self._steps, self._deadline = [h.submit(LearnerWorker.step) for h in self._handles], self._new_deadline()

    @property
    def pending(self) -> list[Promise[StepStats]]:
        """What to wait for: ranks that are still at the step. Raises what one of the others raised, for which these wait in
        vain."""
        return self._left(self._steps, 0.0, self._deadline)

    @property
    def is_done(self) -> bool:
        """Whether every rank has done the step."""
        return not self.pending

    def stats(self) -> StepStats:
        """Wait for the step. Raises WorkerLost, or what the step raised."""
        return self._all(self._steps)

    def close(self) -> None:
        for handle in self._handles:
            handle.close()

    def _all(self, promises: Sequence[Promise[R]]) -> R:
        """The first one's result once all are there. Raises what any of them raised, whichever is first to."""
        left, deadline = promises, self._new_deadline()
        while left:
            left = self._left(left, 1.0, deadline)
        return promises[0].result()

    def _left(self, promises: Sequence[Promise[R]], seconds: float, deadline: float) -> list[Promise[R]]:
        """Those that are not there after `seconds`."""
        there = self._runtime.wait(promises, seconds)
        for promise in there:
            promise.result()
        left = [promise for promise in promises if promise not in there]
        if left and time.monotonic() > deadline:
            raise WorkerLost(self.first.name, f"no answer for {self._seconds:.0f} s (runtime.learner_seconds)")
        return left

    def _new_deadline(self) -> float:
        return time.monotonic() + self._seconds
