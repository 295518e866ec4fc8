"""How workers are called: futures, handles on workers, and the runtime that makes them.

A worker is a plain class that knows nothing of this. A handle calls one of its methods and returns a future; a future
that is passed to another call travels by reference. local.py keeps everything in one process, ray.py spreads it over a
cluster.
"""

from collections.abc import Callable, Collection
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")

LOOPBACK = "127.0.0.1"
OBJECT = "object"  # the kind of a lost result that is not known to belong to a worker


class WorkerLost(Exception):
    """Worker `name` died, or was killed because it did not answer; the message says how."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    @property
    def kind(self) -> str:
        """rollout, reward, replay, recorder, learner, or OBJECT."""
        return self.name.partition("-")[0]


class Future(Protocol[T_co]):
    """The result of a call, some time."""

    def result(self) -> T_co:
        """Wait for the result and fetch it. Raises WorkerLost, or what the call raised."""
        ...


def as_argument(future: Future[T]) -> T:
    """`future` as an argument of another call, which will receive its result."""
    return cast(T, future)


class Handle(Protocol[T_co]):
    """A worker somewhere. `submit(Worker.method, ...)` keeps the call type-checked."""

    name: str

    @property
    def host(self) -> str:
        """The address of the worker's machine, as the others see it."""
        ...

    def submit(self, method: Callable[Concatenate[T_co, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]: ...

    def close(self) -> None:
        """Let the worker close what it holds, and end it."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Runtime(Protocol):
    """Makes workers. `kind` is one of rollout, reward, replay, learner and recorder."""

    def start(self, kind: str, factory: Callable[[], T], *, name: str) -> Handle[T]:
        """A worker made by `factory`, which must not need anything of this process if workers live in others."""
        ...

    def wait(self, futures: Collection[Future[R]], seconds: float) -> list[Future[R]]:
        """Those that are done, as soon as one is or `seconds` have passed."""
        ...

    def close(self) -> None: ...


def close_worker(worker: object) -> None:
    """Call the worker's `close`, if it has one."""
    close = getattr(worker, "close", None)
    if close is not None:
        close()
