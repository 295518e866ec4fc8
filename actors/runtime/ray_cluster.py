"""A Ray cluster: connecting to one or starting one, and what it must have. Knows Ray; knows no worker.

A cluster of our own binds to the loopback, requires a token, runs no dashboard, and keeps its files in the run folder.
"""

import hashlib
import importlib
import os
import secrets
import socket
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray.job_config import JobConfig

from actors.runtime.base import LOOPBACK
from conf.errors import UsageError

OURS = str(Path(__file__).resolve().parents[2])
SMALL_OBJECT_BYTES = 8192  # larger results live in the object store, not in the driver


@dataclass(frozen=True)
class Resources:
    """What one worker of a kind reserves, and whether it must be on the driver's machine, for the sake of its files."""

    count: int
    cpus: float
    gpus: float = 0.0
    with_driver: bool = False


def connect(folder: Path, address: str | None, cpus: int) -> Path | None:
    """Connect to the cluster at `address`, or start one with at least `cpus` whose files lie in `folder`.

    Returns the link through which a cluster of our own reaches its files. Raises UsageError.
    """
    link: Path | None = None
    options: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "configure_logging": False,
        "namespace": "epiphany",
        "job_config": JobConfig(_py_driver_sys_path=_OursFirst([OURS])),
    }
    if address is None:
        # Ray takes 127.0.0.1 for a mistake and puts the machine's outer address in its place, whereupon its servers
        # listen to everyone. Remove when ray.init can be told to stay on the loopback.
        services.resolve_ip_for_localhost = lambda host: host
        (folder / "ray").mkdir(exist_ok=True)
        _demand_token(folder / "ray" / "token")
        # Sockets have short names: Ray's files are in the run folder by way of a short link.
        link = Path(tempfile.gettempdir()) / f"epiphany-{hashlib.sha256(str(folder).encode()).hexdigest()[:10]}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder / "ray")
        options |= {
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "_node_ip_address": LOOPBACK,
            "_temp_dir": str(link),
            "_system_config": {
                "max_direct_call_object_size": SMALL_OBJECT_BYTES,
                "worker_niceness": 0,
                # Ours end by themselves, but for the one that takes away shared memory after the others.
                "kill_child_processes_on_worker_exit": False,
            },
        }
    try:
        if address is not None:
            options["address"] = _answering(address)
        ray.init(**options)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"runtime.address={address}: {' '.join(str(error).split())[:400]}") from error
    return link


class _OursFirst(list[str]):
    """Folders that each Ray worker inserts at the front of its import path, one after the other.

    Ray appends the user's folder, which may hold a rewards.py or a conf/. Here it comes first, so that ours ends up in
    front of it.
    """

    def extend(self, paths: Iterable[str]) -> None:
        self[:0] = paths


def _answering(address: str) -> str:
    """The host:port of a cluster, if anything answers there; Ray itself would keep trying for a quarter of an hour.

    Raises OSError (a ConnectionError if "auto" finds none).
    """
    resolved = services.canonicalize_bootstrap_address_or_die(address)
    host, _, port = resolved.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    return resolved


def local_versions() -> dict[str, str]:
    """Versions that must be the same on all machines. Ray itself compares its own and Python's."""
    return {name: _version(name) for name in ("epiphany-rl", "torch", "transformers", "pyarrow")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # Epiphany itself, where it is run from its folder


def compare_versions(driver: Mapping[str, str]) -> None:
    """Raises UsageError if this machine has other versions than the driver's."""
    differing = [
        f"{name} {installed}, the driver {driver[name]}"
        for name, installed in local_versions().items()
        if installed != driver[name]
    ]
    if differing:
        raise UsageError(
            f"{ray.util.get_node_ip_address()} has {'; '.join(differing)}: install the same on every machine"
        )


def _demand_token(file: Path) -> None:
    """Let this run's cluster answer only those who know what is in `file`. Ray reads such settings when it is
    imported, which vLLM may have done already, so that they are read again (as Ray's own tests do it)."""
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "RAY_USAGE_STATS_ENABLED": "0"}
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def missing_resources(resources: Mapping[str, Resources]) -> str:
    """What is asked for beyond what the cluster has, for instance "2 GPU"."""
    available = ray.cluster_resources()
    needed = {
        "CPU": sum(r.cpus * r.count for r in resources.values()),
        "GPU": sum(r.gpus * r.count for r in resources.values()),
    }
    lacking = [f"{n - available.get(name, 0):g} {name}" for name, n in needed.items() if n > available.get(name, 0)]
    return " and ".join(lacking) or "free resources (others use them)"
