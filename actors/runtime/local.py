"""LocalRuntime: every worker in this process. Knows threads; knows no worker."""

import concurrent.futures
from collections.abc import Callable, Collection, Mapping
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

from actors.runtime.base import LOOPBACK, Future, Handle, close_worker

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


class LocalFuture(Future[R], Generic[R]):
    """A future of this process."""

    def __init__(self, future: concurrent.futures.Future[R]) -> None:
        self.future = future

    def result(self) -> R:
        return self.future.result()


def _call(method: Callable[..., R], worker: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> R:
    """Call `method` with the results of those arguments that are futures."""
    return method(worker, *(a.result() if isinstance(a, LocalFuture) else a for a in args), **kwargs)


class LocalHandle(Generic[T]):
    """A worker that is called at once: its future is done when `submit` returns."""

    host = LOOPBACK

    def __init__(self, worker: T, name: str) -> None:
        self._worker = worker
        self.name = name

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: concurrent.futures.Future[R] = concurrent.futures.Future()
        future.set_result(_call(method, self._worker, args, kwargs))
        return LocalFuture(future)

    def close(self) -> None:
        close_worker(self._worker)

    def kill(self) -> None:
        self.close()


class ThreadHandle(Generic[T]):
    """A worker in a thread of its own; its calls are made in order."""

    host = LOOPBACK

    def __init__(self, factory: Callable[[], T], name: str) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._worker = self._thread.submit(factory).result()
        self.name = name

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        return LocalFuture(self._thread.submit(_call, method, self._worker, args, kwargs))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        close_worker(self._worker)

    def kill(self) -> None:
        self.close()


class LocalRuntime:
    """Everything in one process. Reward workers get threads, because scoring waits for child processes."""

    def start(self, kind: str, factory: Callable[[], T], *, name: str) -> Handle[T]:
        return ThreadHandle(factory, name) if kind == "reward" else LocalHandle(factory(), name)

    def wait(self, futures: Collection[Future[R]], seconds: float) -> list[Future[R]]:
        local = {cast(LocalFuture[R], future).future: future for future in futures}
        done = concurrent.futures.wait(local, seconds, return_when=concurrent.futures.FIRST_COMPLETED).done
        return [local[future] for future in done]

    def close(self) -> None: ...
