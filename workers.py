"""From settings to the runtime and its workers, in this process or in another.

With `engine`, rollout and learner share it and its weights; without, each builds what it needs where it runs. Models and
what computes with them are imported where they are made: a worker that scores or stores starts without them. Knows every
package but report.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from actors.engine import Engine
from actors.ledger import Ledger
from actors.replay import Replay
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker
from actors.runtime import LocalRuntime, Runtime
from conf.errors import UsageError
from conf.schema import Settings

if TYPE_CHECKING:
    from learner.build import Blueprint
    from learner.ranks import Ranks
    from learner.worker import LearnerWorker


def make_rollout(settings: Settings, name: str, engine: Engine | None = None) -> RolloutWorker:
    """A rollout worker on `engine`, or on one of its own."""
    is_own = engine is None
    if engine is None:
        from actors.build import build_engine, build_machine, build_model_source, choose_engine
        from learner.build import draw

        machine = build_machine(settings)
        source, tokenizer = build_model_source(settings)
        blueprint = draw(settings, machine, source, roles=frozenset({"rollout"}))
        kind, _ = choose_engine(blueprint.settings, machine)
        engine = build_engine(blueprint.settings, machine, kind, source, tokenizer, blueprint.layout)
    return RolloutWorker(engine, seed=settings.run.seed, name=name, is_own=is_own)


def make_learner(
    settings: Settings, checkpoints: Path, mark: str, rank: Ranks, blueprint: Blueprint | None = None,
    engine: Engine | None = None,
) -> LearnerWorker:  # fmt: skip
    """A learner over the weights of `engine`, or over its own; one of several or alone. Raises UsageError if the driver's
    `mark` in the run folder cannot be seen: checkpoints written there would not be found again."""
    from actors.build import build_machine, build_model_source
    from learner.build import build_learner, draw
    from learner.worker import LearnerWorker

    lock = checkpoints.parent / "lock"
    if not lock.is_file() or lock.read_text() != mark:
        raise UsageError(
            f"run.folder={checkpoints.parent} is another place for the learner on {os.uname().nodename}: choose one that all "
            "machines share"
        )
    notes = []
    if blueprint is None:
        machine = build_machine(settings)
        source, _ = build_model_source(settings)
        blueprint = draw(settings, machine, source, roles=frozenset({"learner"}))
        notes = [f"the learner is on {machine.device} in {machine.dtype}", *blueprint.notes]
    learner, origin = build_learner(blueprint, engine=engine)
    return LearnerWorker(
        learner, rank=rank, checkpoints=checkpoints, base_model=settings.model.path, keep=settings.run.keep_checkpoints,
        on_host=engine is None, notes=[*notes, f"the learner's base weights: {origin}"],
    )  # fmt: skip


def make_reward(settings: Settings) -> RewardWorker:
    """A reward worker, with a child process of its own."""
    reward = settings.reward
    return RewardWorker(
        reward.terms, deadline_seconds=reward.deadline_seconds, memory_gib=reward.memory_gib,
        max_tokens=settings.sampling.max_tokens,
    )  # fmt: skip


def make_replay(settings: Settings, journal: Path, ledger: Ledger, version: int) -> Replay:
    """The replay, with what its journal holds that is not trained and may still be."""
    max_staleness = settings.runtime.max_staleness

    def usable(batch: pa.RecordBatch) -> bool:
        versions = [span["version"] for spans in batch.column("version_spans").to_pylist() for span in spans]
        fresh = max(versions) <= version and version - min(versions) <= max_staleness
        return fresh and not ledger.is_finished(batch.column("ordinal")[0].as_py())

    a = settings.algorithm
    capacity = 2 * a.prompts_per_step * (1 + max_staleness)
    max_flat = round(a.max_resampled * a.prompts_per_step) if a.flat_groups == "resample" else 0
    replay = Replay(journal, capacity=capacity, quorum=settings.reward.quorum, max_flat=max_flat)
    replay.recover(usable)
    return replay


def build_runtime(settings: Settings, folder: Path) -> Runtime:
    """The runtime that `runtime.name` asks for: the only branch between one process and a cluster."""
    r = settings.runtime
    if r.name == "local":
        return LocalRuntime()
    from actors.ray_runtime import RayRuntime, Resources

    threads = settings.hardware.threads or 1
    cpus = {"rollout": (r.rollout_workers, threads * settings.engine.tensor_parallel_size), "learner": (r.learner_ranks, threads), "reward": (r.reward_workers, 0.1),
            "replay": (1, 0.1), "recorder": (1, 0.1)}  # fmt: skip
    runtime = RayRuntime(folder=folder, address=r.address, cpus=math.ceil(sum(n * each for n, each in cpus.values())))
    gpus: dict[str, float] = {}
    if settings.hardware.device == "cuda" or (settings.hardware.device == "auto" and runtime.gpus):
        needs = {"rollout": (r.rollout_gpus, settings.engine.tensor_parallel_size), "learner": (r.learner_gpus, 1)}
        gpus = {kind: need if asked is None else asked for kind, (asked, need) in needs.items()}
    resources = {
        kind: Resources(n, each, gpus.get(kind, 0.0), with_driver=kind in ("replay", "recorder"))
        for kind, (n, each) in cpus.items()
    }
    # A cluster of our own has what it has; another may be growing.
    try:
        runtime.reserve(resources, r.start_seconds if r.address else 5.0)
    except UsageError:
        runtime.close()
        raise
    return runtime


def share_cores(settings: Settings) -> Settings:
    """Give workers that share this machine's cores a share of them each."""
    r, hardware = settings.runtime, settings.hardware
    if r.name == "local" or hardware.threads is not None:
        return settings
    threads = max(1, len(os.sched_getaffinity(0)) // (r.rollout_workers + r.learner_ranks))
    return replace(settings, hardware=replace(hardware, threads=threads))
