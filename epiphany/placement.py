"""Where the workers of a run live: in this process, or on a Ray cluster with what each of them reserves.

`make_runtime` is the only branch between one process and a cluster. Knows runtimes; knows no worker.
"""

import math
import os
from pathlib import Path

from actors.runtime.base import Runtime
from actors.runtime.local import LocalRuntime
from actors.runtime.supervisor import Timeouts
from conf.errors import UsageError
from conf.schema import Settings


def make_runtime(settings: Settings, folder: Path, *, learners: bool = True) -> Runtime:
    """The runtime that `runtime.name` asks for: the only branch between one process and a cluster.

    Without `learners` it has no place for them, nor for what stores and records what they train.
    """
    asked = settings.runtime
    if asked.name == "local":
        return LocalRuntime()
    from actors.runtime.ray import RayRuntime, Resources

    tensor_parallel = settings.engine.tensor_parallel_size
    threads = threads_of(settings)
    cpus: dict[str, tuple[int, float]] = {
        "rollout": (asked.rollout_workers, threads * tensor_parallel),
        "reward": (asked.reward_workers, 0.1),
    }
    if learners:
        cpus |= {"learner": (asked.learner_data_parallel_size, threads), "replay": (1, 0.1), "recorder": (1, 0.1)}
    needed = math.ceil(sum(count * each for count, each in cpus.values()))
    runtime = RayRuntime(folder=folder, address=asked.address, cpus=needed)
    gpus: dict[str, float] = {}
    if settings.hardware.device == "cuda" or (settings.hardware.device == "auto" and runtime.gpus):
        gpus["rollout"] = tensor_parallel if asked.rollout_gpus is None else asked.rollout_gpus
        gpus["learner"] = 1 if asked.learner_gpus is None else asked.learner_gpus
    resources = {
        kind: Resources(count, each, gpus.get(kind, 0.0), with_driver=kind in ("replay", "recorder"))
        for kind, (count, each) in cpus.items()
    }
    try:
        # A cluster of our own has what it has; another may be growing.
        runtime.reserve(resources, asked.worker_start_timeout_seconds if asked.address else 5.0)
    except UsageError:
        runtime.close()
        raise
    return runtime


def threads_of(settings: Settings) -> int:
    """Threads of one worker: those asked for, or its share of this machine's cores.

    With Ray, the rollout workers and learners of a machine share its cores.
    """
    if settings.hardware.threads is not None:
        return settings.hardware.threads
    runtime, cores = settings.runtime, len(os.sched_getaffinity(0))
    if runtime.name == "local":
        return cores
    return max(1, cores // (runtime.rollout_workers + runtime.learner_data_parallel_size))


def timeouts_of(settings: Settings) -> Timeouts:
    asked = settings.runtime
    if asked.name == "local":
        return Timeouts()
    return Timeouts(
        asked.worker_start_timeout_seconds, asked.worker_timeout_seconds, max_restarts=asked.max_worker_restarts
    )
