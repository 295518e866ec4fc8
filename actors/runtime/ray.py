"""RayRuntime: each worker a Ray actor, each future an object reference.

Rows pass from worker to worker through the object store. Only this file and ray_cluster.py import Ray.
"""

import contextlib
import gc
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.runtime.base import OBJECT, Future, Handle, WorkerLost, close_worker
from actors.runtime.ray_cluster import (
    Resources,
    compare_versions,
    connect,
    local_versions,
    missing_resources,
)
from conf.errors import UsageError

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
REPLACEABLE = ("rollout", "reward")


class RayFuture(Future[R], Generic[R]):
    """An object reference, and the worker that answers."""

    def __init__(self, ref: Any, owner: str, names: Mapping[str, str]) -> None:
        self.ref = ref
        self._owner = owner
        self._names = names

    def result(self) -> R:
        try:
            return ray.get(self.ref)
        except (RayActorError, ObjectLostError) as error:
            raise _lost(error, self._names) from error
        except RayTaskError as error:
            cause: Any = error.cause
            while isinstance(cause, RayTaskError):  # an argument's own failure
                cause = cause.cause
            if isinstance(cause, (RayActorError, ObjectLostError)):  # an argument was lost on its way
                raise _lost(cause, self._names) from error
            if self._owner.startswith(REPLACEABLE) and not isinstance(cause, UsageError):
                # Any exception is fatal for an engine: its state is unknown.
                raise WorkerLost(self._owner, f"{type(cause).__name__}: {cause}") from error
            raise cause from error


def _lost(error: RayActorError | ObjectLostError, names: Mapping[str, str]) -> WorkerLost:
    name = names.get(getattr(error, "actor_id", None) or "", OBJECT)
    detail = re.search(r"Worker exit detail: ([^.]*)", str(error))
    raised = re.search(r"creation task.*^([\w.]+(?:Error|Exception)\b.*)", str(error), re.DOTALL | re.MULTILINE)
    if detail:
        reason = f"its process died: {detail[1]}"
    elif raised:
        reason = f"it did not start: {' '.join(raised[1].split())[:400]}"
    else:
        reason = " ".join(str(error).split())[:200]
    return WorkerLost(name, reason)


class _Actor:
    """Holds a worker and calls its methods by name.

    A UsageError of its start is raised by every call: Ray would only tell that the actor died.
    """

    def __init__(self, factory: Callable[[], Any], versions: Mapping[str, str]) -> None:
        self._worker = self._error = None
        try:
            compare_versions(versions)
            self._worker = factory()
            gc.freeze()  # no collection need look at long-lived objects of models and libraries again
        except UsageError as error:
            self._error = error

    def call(self, method: str, arguments: Mapping[str, Any], *args: Any) -> Any:
        if self._error is not None:
            raise self._error
        return getattr(self._worker, method)(*args, **arguments)

    def host(self) -> str:
        return ray.util.get_node_ip_address()

    def close(self) -> None:
        close_worker(self._worker)


class RayHandle(Generic[T]):
    """A worker in an actor."""

    def __init__(self, actor: Any, name: str, names: Mapping[str, str]) -> None:
        self._actor = actor
        self._names = names
        self.name = name

    @property
    def host(self) -> str:
        return RayFuture[str](self._actor.host.remote(), self.name, self._names).result()

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        arguments = [a.ref if isinstance(a, RayFuture) else a for a in args]
        return RayFuture(self._actor.call.remote(method.__name__, kwargs, *arguments), self.name, self._names)

    def close(self) -> None:
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(self._actor.close.remote(), timeout=10)
        self.kill()

    def kill(self) -> None:
        ray.kill(self._actor)


class RayRuntime:
    """Workers on a Ray cluster: a new one on this machine, or the one at `address` ("auto" finds it).

    A new one has at least `cpus`, however few the machine has: workers share them. Raises UsageError if the cluster
    cannot be reached.
    """

    def __init__(self, *, folder: Path, address: str | None = None, cpus: int = 1) -> None:
        self._names: dict[str, str] = {}
        self._link = connect(folder, address, cpus)

    @property
    def gpus(self) -> float:
        """GPUs of the whole cluster, in use or not."""
        return float(ray.cluster_resources().get("GPU", 0))

    def reserve(self, resources: Mapping[str, Resources], seconds: float) -> None:
        """Reserve in one placement group what each kind of worker needs, before any starts.

        Raises UsageError if the cluster lacks something for `seconds`.
        """
        self._kinds = dict(resources)
        places = [f"{kind}-{i}" for kind, r in resources.items() for i in range(r.count)]
        self._bundle = {place: i for i, place in enumerate(places)}
        here = f"node:{ray.util.get_node_ip_address()}"
        bundles = [
            {"CPU": r.cpus} | ({"GPU": r.gpus} if r.gpus else {}) | ({here: 0.001} if r.with_driver else {})
            for r in resources.values()
            for _ in range(r.count)
        ]
        self._group = placement_group(bundles, strategy="PACK")
        started = time.monotonic()
        if not self._group.wait(seconds):
            missing = missing_resources(resources)
            remove_placement_group(self._group)
            raise UsageError(
                f"runtime=ray: the cluster lacks {missing} after {time.monotonic() - started:.0f} s; ask for fewer "
                "workers (runtime.rollout_workers, runtime.reward_workers), let workers share a GPU "
                "(runtime.rollout_gpus=0.5 runtime.learner_gpus=0.5) or add nodes"
            )

    def start(self, kind: str, factory: Callable[[], T], *, name: str) -> Handle[T]:
        r = self._kinds[kind]
        place = name.partition("#")[0]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._bundle[place])
        actor_class: Any = ray.remote(type(kind.capitalize(), (_Actor,), {}))  # processes are named by it: ray::Rollout
        options = {"num_cpus": r.cpus, "num_gpus": r.gpus, "scheduling_strategy": strategy, "max_restarts": 0}
        actor = actor_class.options(**options).remote(factory, local_versions())
        self._names[actor._actor_id.hex()] = name
        return RayHandle(actor, name, self._names)

    def wait(self, futures: Collection[Future[Any]], seconds: float) -> list[Future[Any]]:
        by_ref = {p.ref: p for p in futures if isinstance(p, RayFuture)}
        if not by_ref:
            return []
        refs = list(by_ref)
        first, _ = ray.wait(refs, num_returns=1, timeout=seconds, fetch_local=False)
        if not first:
            return []
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return [by_ref[ref] for ref in done]

    def release(self) -> None:
        """Give back what was reserved."""
        remove_placement_group(self._group)

    def close(self) -> None:
        self.release()
        ray.shutdown()
        if self._link is not None:
            self._link.unlink(missing_ok=True)
