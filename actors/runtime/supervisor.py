"""Supervisor: keeps workers running. It notices those that die or hang, replaces them, and counts.

A slot is a worker's place: rollout-0 stays rollout-0 whoever holds it. Knows the runtime's protocols; does not know
what the workers do.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Concatenate, Generic, ParamSpec, TypeVar

from actors.runtime.base import OBJECT, Future, Handle, Runtime, WorkerLost
from conf.errors import UsageError

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class TooManyRestarts(UsageError):
    """Workers are lost faster than the run makes progress; the message names the last reason."""

    exit_code = 3


@dataclass(frozen=True)
class Timeouts:
    """Seconds without an answer after which a worker counts as lost: before its first answer and after it.

    `max_restarts` is how often one slot may be replaced without an optimizer step in between.
    """

    start_seconds: float = math.inf
    answer_seconds: float = math.inf
    max_restarts: int = 0


@dataclass(eq=False)
class WorkerSlot(Generic[T]):
    """A worker's place: its current handle, since when it owes an answer, and how often it was replaced."""

    kind: str
    index: int
    make_factory: Callable[[str], Callable[[], T]]
    handle: Handle[T]
    is_ready: bool = False
    waiting_since: float = field(default_factory=time.monotonic)
    restarts: int = 0
    restarts_since_step: int = 0

    @property
    def name(self) -> str:
        """Without the number of the restart."""
        return f"{self.kind}-{self.index}"

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call the worker that holds the slot now."""
        return self.handle.submit(method, *args, **kwargs)


@dataclass(frozen=True)
class _Call:
    slot: WorkerSlot
    then: Callable[[Future], None]


class Supervisor:
    """Starts workers over `runtime` and replaces lost ones; `note` tells the user.

    `on_replaced` is called with each slot that has a new worker. Raises TooManyRestarts.
    """

    def __init__(self, runtime: Runtime, *, timeouts: Timeouts, note: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._timeouts = timeouts
        self._note = note
        self._calls: dict[Future, _Call] = {}
        self.slots: list[WorkerSlot] = []
        self.on_replaced: Callable[[WorkerSlot, WorkerLost], None] = lambda _slot, _lost: None

    def start(self, kind: str, count: int, make_factory: Callable[[str], Callable[[], T]]) -> list[WorkerSlot[T]]:
        """Start `count` workers; `make_factory(name)` gives the factory of one, now and whenever one is replaced."""
        started = [
            WorkerSlot(kind, i, make_factory, self._runtime.start(kind, make_factory(name), name=name))
            for i, name in enumerate(f"{kind}-{i}" for i in range(count))
        ]
        self.slots += started
        return started

    @property
    def is_watching(self) -> bool:
        """Whether any answer is still to come."""
        return bool(self._calls)

    def slot(self, kind: str) -> WorkerSlot:
        """The first worker of a kind."""
        return next(slot for slot in self.slots if slot.kind == kind)

    def watch(self, slot: WorkerSlot, future: Future[R], then: Callable[[Future[R]], None]) -> None:
        """Call `then(future)` in a later `poll`, once the future is done; a WorkerLost that it raises is dealt with."""
        if not any(call.slot is slot for call in self._calls.values()):
            slot.waiting_since = time.monotonic()
        self._calls[future] = _Call(slot, then)

    def poll(self, seconds: float, *others: Future) -> None:
        """Deal with every watched future that is done, once one of them or of `others` is, or `seconds` have passed.

        Raises WorkerLost if a worker was lost that cannot be replaced.
        """
        futures = [*self._calls, *others]
        for future in self._runtime.wait(futures, seconds) if futures else ():
            call = self._calls.pop(future, None)
            if call is None:
                continue
            call.slot.waiting_since, call.slot.is_ready = time.monotonic(), True
            try:
                call.then(future)
            except WorkerLost as lost:
                if not self.replace_lost(lost):
                    raise
        self._kill_stalled()

    def retry_on_worker_loss(self, call: Callable[[], R]) -> R:
        """What `call` returns, made again if a worker that can be replaced was lost. Raises WorkerLost for others."""
        while True:
            try:
                return call()
            except WorkerLost as lost:
                if not self.replace_lost(lost):
                    raise

    def replace_lost(self, lost: WorkerLost) -> bool:
        """Replace the worker that `lost` names if it still holds its slot. True if the caller should retry."""
        for slot in self.slots:
            if slot.handle.name == lost.name:
                self._replace(slot, lost)
        return lost.kind == OBJECT or any(slot.kind == lost.kind for slot in self.slots)

    def count_step(self) -> None:
        """An optimizer step was made: restarts are counted from here."""
        for slot in self.slots:
            slot.restarts_since_step = 0

    def close(self) -> None:
        for slot in self.slots:
            slot.handle.close()

    def _replace(self, slot: WorkerSlot, lost: WorkerLost) -> None:
        slot.restarts += 1
        slot.restarts_since_step += 1
        if slot.restarts_since_step > self._timeouts.max_restarts:
            raise TooManyRestarts(
                f"{slot.name} was lost {slot.restarts_since_step} times without an optimizer step in between; the last "
                f"time: {lost.reason}"
            )
        self._note(f"lost {slot.handle.name} ({lost.reason}); it is replaced")
        slot.handle.kill()
        self._calls = {future: call for future, call in self._calls.items() if call.slot is not slot}
        name = f"{slot.name}#{slot.restarts}"
        slot.is_ready = False
        slot.handle = self._runtime.start(slot.kind, slot.make_factory(name), name=name)
        self.on_replaced(slot, lost)

    def _kill_stalled(self) -> None:
        now = time.monotonic()
        for slot in _distinct([call.slot for call in self._calls.values()]):
            limit = self._timeouts.answer_seconds if slot.is_ready else self._timeouts.start_seconds
            if now - slot.waiting_since > limit:
                self._replace(slot, WorkerLost(slot.handle.name, f"no answer for {now - slot.waiting_since:.0f} s"))


def _distinct(slots: Sequence[WorkerSlot]) -> list[WorkerSlot]:
    return list({id(slot): slot for slot in slots}.values())
