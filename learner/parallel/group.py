"""LearnerGroup: the learner's ranks as the loop sees them. All of them take each step; the first does everything else.

Knows the runtime's protocols and the learner's worker; knows neither Ray nor where rows come from.
"""

import time
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import pyarrow as pa

from actors.runtime.base import Future, Handle, Runtime, WorkerLost, as_argument
from conf.errors import UsageError
from learner.metrics import StepStats
from learner.parallel.worker import LearnerWorker, Resumed

P = ParamSpec("P")
R = TypeVar("R")


class StepFuture:
    """A step that every rank has begun. `stats()` waits for it."""

    def __init__(self, group: "LearnerGroup", futures: Sequence[Future[StepStats]]) -> None:
        self._group = group
        self._futures = futures
        self._deadline = group.new_deadline()

    def pending(self) -> list[Future[StepStats]]:
        """The ranks' futures that are not done. Raises the first failure of a rank; the others then wait forever."""
        return self._group.pending(self._futures, 0.0, self._deadline)

    def stats(self) -> StepStats:
        """Wait for all ranks. Raises WorkerLost, or what the step raised."""
        return self._group.wait(self._futures, self._deadline)


class LearnerGroup:
    """Learners that hold the same weights and have `seconds` for each call, and for each exchange of gradients.

    Raises WorkerLost if they are not done by then.
    """

    def __init__(self, runtime: Runtime, handles: Sequence[Handle[LearnerWorker]], *, seconds: float) -> None:
        self._runtime = runtime
        self._handles = handles
        self._seconds = seconds
        self.first = handles[0]
        if len(handles) > 1:
            host = self.first.host
            kinds = {handle.submit(LearnerWorker.optimizer_kind).result() for handle in handles}
            if len(kinds) > 1:
                raise UsageError(
                    f"learner.optimizer=auto: by free memory, some learners would use {' and others '.join(kinds)}, "
                    "and drift apart; choose one of them"
                )
            port = self.first.submit(LearnerWorker.open_store, host).result()
            self.wait([h.submit(LearnerWorker.join, host, port, h.host, seconds) for h in handles])

    def call(self, method: Callable[Concatenate[LearnerWorker, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the first rank answers."""
        return self.wait([self.first.submit(method, *args, **kwargs)])

    def resume(self, resume: str) -> Resumed | None:
        """Let every rank continue from a checkpoint (LearnerWorker.resume)."""
        return self.wait([handle.submit(LearnerWorker.resume, resume) for handle in self._handles])

    def send(self, table: Future[pa.Table]) -> None:
        """Send the rows of a step to every rank: a rank without them would leave the others waiting."""
        self.wait([handle.submit(LearnerWorker.receive, as_argument(table)) for handle in self._handles])

    def step(self) -> StepFuture:
        """Begin a step on the rows that were sent."""
        return StepFuture(self, [handle.submit(LearnerWorker.step) for handle in self._handles])

    def warm_up(self, table: pa.Table) -> StepStats:
        """A supervised step of all ranks on the rows of `table`."""
        return self.wait([handle.submit(LearnerWorker.warm_up, table) for handle in self._handles])

    def end_warm_up(self) -> None:
        """Free what warming up needed."""
        self.wait([handle.submit(LearnerWorker.end_warm_up) for handle in self._handles])

    def close(self) -> None:
        for handle in self._handles:
            handle.close()

    def wait(self, futures: Sequence[Future[R]], deadline: float | None = None) -> R:
        """The first one's result once all are done. Raises the first failure of any of them."""
        remaining, deadline = list(futures), deadline or self.new_deadline()
        while remaining:
            remaining = self.pending(remaining, 1.0, deadline)
        return futures[0].result()

    def pending(self, futures: Sequence[Future[R]], seconds: float, deadline: float) -> list[Future[R]]:
        """Those that are not done after `seconds`."""
        done = self._runtime.wait(futures, seconds)
        for future in done:
            future.result()
        remaining = [future for future in futures if future not in done]
        if remaining and time.monotonic() > deadline:
            raise WorkerLost(self.first.name, f"no answer for {self._seconds:.0f} s (runtime.learner_timeout_seconds)")
        return remaining

    def new_deadline(self) -> float:
        return time.monotonic() + self._seconds
