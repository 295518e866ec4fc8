"""How workers are run: promises, handles on workers, and the runtime that keeps everything in one process.

A worker is a plain class that knows nothing of this. A handle calls one of its methods and gives a promise; a promise
that is passed to another call travels by reference. ray_runtime.py does the same over a cluster.
"""

from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")


LOOPBACK = "127.0.0.1"
OBJECT = "object"  # the name of what is lost when a result is, on its way between workers


class WorkerLost(Exception):
    """Worker `name` died, or was ended because it did not answer; the message says how."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Promise(Protocol[T_co]):
    """What a call will bring."""

    def result(self) -> T_co:
        """Wait for it and fetch it. Raises WorkerLost, or what the call raised."""
        ...


def passed(promise: Promise[T]) -> T:
    """`promise` as an argument of another call, which will see its result."""
    return cast(Any, promise)


class Handle(Protocol[T]):
    """A worker somewhere. `submit(Worker.method, ...)` keeps the call type-checked."""

    name: str

    @property
    def host(self) -> str:
        """The address of the worker's machine, as the others see it."""
        ...

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Promise[R]: ...

    def close(self) -> None:
        """Let the worker close what it holds, and end it."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Runtime(Protocol):
    """Makes workers. `kind` is one of rollout, reward, replay, learner and recorder."""

    def start(self, kind: str, factory: Callable[[], T], *, name: str) -> Handle[T]:
        """A worker made by `factory`, which must not need anything of this process where workers live in others."""
        ...

    def wait(self, promises: Collection[Promise[Any]], seconds: float) -> list[Promise[Any]]:
        """Those that are there, once one is or `seconds` have passed."""
        ...

    def close(self) -> None: ...


class _Kept(Promise[T]):
    """A promise of this process."""

    def __init__(self, future: Future[T]) -> None:
        self.future = future

    def result(self) -> T:
        return self.future.result()


def _unpacked(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.result() if isinstance(a, _Kept) else a for a in arguments]


class LocalHandle(Generic[T]):
    """A worker in this process: the call is made at once and its promise is there."""

    host = LOOPBACK

    def __init__(self, worker: T, name: str) -> None:
        self._worker = worker
        self.name = name

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Promise[R]:
        future: Future[R] = Future()
        future.set_result(method(self._worker, *_unpacked(args), **kwargs))  # type: ignore[arg-type]
        return _Kept(future)

    def close(self) -> None:
        _close(self._worker)

    def kill(self) -> None:
        self.close()


class ThreadHandle(Generic[T]):
    """A worker in a thread of its own; its calls are made in order."""

    host = LOOPBACK

    def __init__(self, factory: Callable[[], T], name: str) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._worker = self._thread.submit(factory).result()
        self.name = name

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Promise[R]:
        return _Kept(self._thread.submit(lambda: method(self._worker, *_unpacked(args), **kwargs)))  # type: ignore[arg-type]

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        _close(self._worker)

    def kill(self) -> None:
        self.close()


class LocalRuntime:
    """Everything in one process. Reward workers get threads: scoring waits on child processes, not on this one."""

    def start(self, kind: str, factory: Callable[[], T], *, name: str) -> Handle[T]:
        return ThreadHandle(factory, name) if kind == "reward" else LocalHandle(factory(), name)

    def wait(self, promises: Collection[Promise[Any]], seconds: float) -> list[Promise[Any]]:
        kept = {p.future: p for p in promises if isinstance(p, _Kept)}
        return [kept[future] for future in wait(kept, seconds, return_when=FIRST_COMPLETED).done]

    def close(self) -> None: ...


def _close(worker: object) -> None:
    close = getattr(worker, "close", None)
    if close is not None:
        close()
