"""RayRuntime: each worker a Ray actor, each promise an object reference. The only file that imports Ray.

Rows pass from worker to worker through the object store. Binds to loopback, asks every caller for a token, runs no
dashboard, and keeps Ray's files inside the run folder, unless an address names a cluster that others run.
"""

import contextlib
import gc
import hashlib
import importlib
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import ray
from ray._private import services
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from ray.job_config import JobConfig
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.runtime import LOOPBACK, OBJECT, Handle, Promise, WorkerLost
from conf.errors import UsageError

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
REPLACEABLE = ("rollout", "reward")
OURS = str(Path(__file__).resolve().parents[1])
SMALL_OBJECT_BYTES = 8192  # results over this live in the object store, not in the driver


@dataclass(frozen=True)
class Resources:
    """What one worker of a kind reserves, and whether it must be on the driver's machine, for the sake of its files."""

    count: int
    cpus: float
    gpus: float = 0.0
    with_driver: bool = False


class RayPromise(Promise[R], Generic[R]):
    """An object reference, and whose answer it is."""

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
                # Whatever broke in there, an engine that raised is not to be trusted with the next call.
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


class _OursFirst(list[str]):
    """Folders that Ray's workers put in front of their path one after the other. Ray appends the user's folder, where a
    rewards.py or a conf/ may lie: it goes before what is here already."""

    def extend(self, paths: Iterable[str]) -> None:
        self[:0] = paths


class _Actor:
    """Holds a worker and calls its methods by name. What a user can put right about its start, each call says; Ray would
    keep only that the actor died."""

    def __init__(self, factory: Callable[[], Any], versions: Mapping[str, str]) -> None:
        self._worker = self._error = None
        try:
            _compare(versions)
            self._worker = factory()
            gc.freeze()  # millions of objects of models and libraries that no collection need look at again
        except UsageError as error:
            self._error = error

    def call(self, method: str, arguments: Mapping[str, Any], *args: Any) -> Any:
        if self._error is not None:
            raise self._error
        return getattr(self._worker, method)(*args, **arguments)

    def host(self) -> str:
        return ray.util.get_node_ip_address()

    def close(self) -> None:
        close = getattr(self._worker, "close", None)
        if close is not None:
            close()


class RayHandle(Generic[T]):
    """A worker in an actor."""

    def __init__(self, actor: Any, name: str, names: Mapping[str, str]) -> None:
        self._actor = actor
        self._names = names
        self.name = name

    @property
    def host(self) -> str:
        return RayPromise[str](self._actor.host.remote(), self.name, self._names).result()

    def submit(self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs) -> Promise[R]:
        given = [a.ref if isinstance(a, RayPromise) else a for a in args]
        return RayPromise(self._actor.call.remote(method.__name__, kwargs, *given), self.name, self._names)

    def close(self) -> None:
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(self._actor.close.remote(), timeout=10)
        self.kill()

    def kill(self) -> None:
        ray.kill(self._actor)


class RayRuntime:
    """Workers on a Ray cluster: a new one on this machine, or the one at `address` ("auto" finds it).

    A new one has at least `cpus`, however few the machine has: workers share them. Raises UsageError if the cluster cannot
    be reached.
    """

    def __init__(self, *, folder: Path, address: str | None = None, cpus: int = 1) -> None:
        self._names: dict[str, str] = {}
        self._link: Path | None = None
        self._connect(folder, address, cpus)

    @property
    def gpus(self) -> float:
        """GPUs of the whole cluster, in use or not."""
        return float(ray.cluster_resources().get("GPU", 0))

    def reserve(self, resources: Mapping[str, Resources], seconds: float) -> None:
        """Set aside in one placement group what each kind of worker needs, before any starts. Raises UsageError if the cluster
        lacks something for `seconds`."""
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
            missing = _missing(resources)
            remove_placement_group(self._group)
            raise UsageError(
                f"runtime=ray: the cluster lacks {missing} after {time.monotonic() - started:.0f} s; ask for fewer workers "
                "(runtime.rollout_workers, runtime.reward_workers), let workers share a GPU (runtime.rollout_gpus=0.5 "
                "runtime.learner_gpus=0.5) or add nodes"
            )

    def _connect(self, folder: Path, address: str | None, cpus: int) -> None:
        options: dict[str, Any] = {
            "include_dashboard": False, "log_to_driver": False, "configure_logging": False, "namespace": "epiphany",
            "job_config": JobConfig(_py_driver_sys_path=_OursFirst([OURS])),
        }  # fmt: skip
        if address is None:
            # Ray takes 127.0.0.1 for a mistake and puts the machine's outer address in its place, whereupon its servers
            # listen to everyone. Remove when ray.init can be told to stay on the loopback.
            services.resolve_ip_for_localhost = lambda host: host
            (folder / "ray").mkdir(exist_ok=True)
            _demand_token(folder / "ray" / "token")
            # Sockets have short names: Ray's files are in the run folder by way of a short link.
            self._link = (
                Path(tempfile.gettempdir()) / f"epiphany-{hashlib.sha256(str(folder).encode()).hexdigest()[:10]}"
            )
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(folder / "ray")
            options |= {
                "num_cpus": max(os.cpu_count() or 1, cpus),
                "_node_ip_address": LOOPBACK, "_temp_dir": str(self._link),
                "_system_config": {
                    "max_direct_call_object_size": SMALL_OBJECT_BYTES, "worker_niceness": 0,
                    # Ours end by themselves, but for the one that takes away shared memory after the others.
                    "kill_child_processes_on_worker_exit": False,
                },
            }  # fmt: skip
        try:
            if address is not None:
                options["address"] = _answering(address)
            ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"runtime.address={address}: {' '.join(str(error).split())[:400]}") from error

    def start(self, kind: str, factory: Callable[[], T], *, name: str) -> Handle[T]:
        r = self._kinds[kind]
        place = name.partition("#")[0]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._bundle[place])
        actor_class: Any = ray.remote(type(kind.capitalize(), (_Actor,), {}))  # processes are named by it: ray::Rollout
        options = {"num_cpus": r.cpus, "num_gpus": r.gpus, "scheduling_strategy": strategy, "max_restarts": 0}
        actor = actor_class.options(**options).remote(factory, _versions())
        self._names[actor._actor_id.hex()] = name
        return RayHandle(actor, name, self._names)

    def wait(self, promises: Collection[Promise[Any]], seconds: float) -> list[Promise[Any]]:
        by_ref = {p.ref: p for p in promises if isinstance(p, RayPromise)}
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


def _answering(address: str) -> str:
    """The host:port of a cluster, if anything answers there: Ray itself would keep trying for a quarter of an hour. Raises
    OSError (a ConnectionError where "auto" finds none)."""
    found = services.canonicalize_bootstrap_address_or_die(address)
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    return found


def _versions() -> dict[str, str]:
    """Of what must be the same on all machines, besides Ray and Python, which Ray itself compares."""
    return {name: _version(name) for name in ("epiphany-rl", "torch", "transformers", "pyarrow")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # Epiphany itself, where it is run from its folder


def _compare(driver: Mapping[str, str]) -> None:
    """Raises UsageError if this machine has other versions than the driver's."""
    differing = [
        f"{name} {found}, the driver {driver[name]}" for name, found in _versions().items() if found != driver[name]
    ]
    if differing:
        raise UsageError(
            f"{ray.util.get_node_ip_address()} has {'; '.join(differing)}: install the same on every machine"
        )


def _demand_token(file: Path) -> None:
    """Let this run's cluster answer only those who know what is in `file`. Ray reads such settings when it is imported, which
    vLLM may have done already, so that they are read again (as Ray's own tests do it)."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "RAY_USAGE_STATS_ENABLED": "0"}
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _missing(resources: Mapping[str, Resources]) -> str:
    """What is asked for beyond what the cluster has, for instance "2 GPU"."""
    there = ray.cluster_resources()
    wanted = {
        "CPU": sum(r.cpus * r.count for r in resources.values()),
        "GPU": sum(r.gpus * r.count for r in resources.values()),
    }
    lacking = [f"{n - there.get(name, 0):g} {name}" for name, n in wanted.items() if n > there.get(name, 0)]
    return " and ".join(lacking) or "room (others use what is there)"
