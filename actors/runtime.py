"""How workers are run: a Handle on each, and the runtime that makes them.

A worker is a plain class; a handle calls one of its methods and gives a future. Here every call is made at once, in
this process; `background` workers get a thread of their own (scoring waits on child processes, not on this one).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class Handle(Protocol[T]):
    """A worker somewhere. `submit(Worker.method, ...)` keeps the call type-checked."""

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...

    def close(self) -> None: ...


class LocalHandle(Generic[T]):
    """A worker in this process: the call is made at once and the future is done."""

    def __init__(self, worker: T) -> None:
        self._worker = worker

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        future.set_result(method(self._worker, *args, **kwargs))
        return future

    def close(self) -> None:
        _close(self._worker)


class ThreadHandle(Generic[T]):
    """A worker in a thread of its own; its calls are made in order."""

    def __init__(self, factory: Callable[[], T]) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._worker = self._thread.submit(factory).result()

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        return self._thread.submit(method, self._worker, *args, **kwargs)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        _close(self._worker)


class LocalRuntime:
    """Everything in one process."""

    def start(self, factory: Callable[[], T], *, background: bool = False) -> Handle[T]:
        return ThreadHandle(factory) if background else LocalHandle(factory())


def _close(worker: object) -> None:
    close = getattr(worker, "close", None)
    if close is not None:
        close()
