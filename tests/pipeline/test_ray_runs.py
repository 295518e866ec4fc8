"""Whole runs over Ray: the numbers of one process, and what becomes of them when a part dies."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.processes import (
    LOOPBACK,
    RAY,
    family,
    listening_addresses,
    mapped_files,
    name_of,
    ray_processes,
    wait_until_gone,
)
from tests.helpers.runs import (
    OF_MODULES,
    Launched,
    final,
    launch,
    launch_beside_shadows,
    overrides,
    rows,
    steps_of,
    trained_ordinals,
    wait_for,
)
from tests.helpers.tiny import make_tiny_model


def test_a_run_over_ray_gives_the_numbers_of_one_process(tiny_model: Path, tmp_path: Path):
    """The run over Ray begins in a folder of the user's, whose files have names of ours, and uses modules of it."""
    launch(overrides(tiny_model, tmp_path / "local"))
    learners = ["runtime.learner_data_parallel_size=2", "runtime.learner_shards=2"]
    many = ["runtime=ray", "runtime.rollout_workers=2", *learners]
    launch_beside_shadows(tmp_path, overrides(tiny_model, tmp_path / "ray", *OF_MODULES, *many))
    for one, other in zip(rows(tmp_path / "local"), rows(tmp_path / "ray"), strict=True):
        assert one["reward"] == other["reward"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6) and other["logprob_gap"] < 1e-3
    adapters = [final(tmp_path / name, 4)[0] for name in ("local", "ray")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.nightly
def test_a_learner_or_the_driver_dies_and_the_run_goes_on_from_the_checkpoint(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    arguments = overrides(
        tiny_model,
        folder,
        "runtime=ray",
        "run.steps=30",
        "runtime.max_staleness=1",
        "evaluation.samples=0",
        "runtime.learner_data_parallel_size=2",
    )

    def started(steps: int) -> Launched:
        running = Launched(arguments, tmp_path / f"log-{steps}")
        wait_for(lambda: steps_of(folder) >= steps, 120)
        return running

    running = started(3)
    assert f"running as process {running.pid}" in launch(["task=status", f"run={folder}"])
    processes = ray_processes(running.pid)
    assert listening_addresses(processes) <= LOOPBACK
    learners = [process for process in processes if name_of(process).startswith("ray::Learner")]
    assert len(learners) == 2
    learners[-1].kill()
    code, output = running.wait()
    assert code == 3 and "the same command resumes from the last checkpoint" in output, output
    done = len(rows(folder))
    running = started(done + 3)
    processes += ray_processes(running.pid)
    os.kill(running.pid, signal.SIGKILL)
    running.process.join()
    launch(arguments)
    assert trained_ordinals(folder, 30) == list(range(60))
    # Ray's agents look for their raylet once a minute; workers and daemons end at once.
    wait_until_gone([process for process in processes if name_of(process).startswith(("ray::", "raylet", "gcs"))])


@pytest.mark.nightly
def test_an_engine_over_two_devices_learns_over_ray_and_leaves_nothing(tmp_path: Path):
    """One of its processes is killed on the way."""
    model = make_tiny_model(tmp_path / "model", hidden=256)
    more = ["runtime=ray", "engine.name=vllm", "engine.tensor_parallel_size=2", "run.steps=20", "evaluation.samples=0"]
    folder = tmp_path / "run"
    running = Launched(overrides(model, folder, *more), tmp_path / "log")
    wait_for(lambda: steps_of(folder), 120)
    processes = family(running.pid)
    among = ranks_among(processes)
    ranks = [process for process in processes if process.pid in among]
    shared = {file for files in mapped_files(processes).values() for file in files if file.startswith("/dev/shm/")}
    ranks[0].kill()
    code, output = running.wait()
    assert code == 0 and "lost rollout-0 (RuntimeError" in output, output
    gaps = [row["logprob_gap"] for row in rows(folder) if row["logprob_gap"] is not None]
    assert gaps and 0 < max(gaps) < 1e-3
    assert trained_ordinals(folder, 20) == list(range(40))
    wait_until_gone(ranks)
    wait_for(lambda: not any(Path(file).exists() for file in shared))


def ranks_among(processes: list[psutil.Process]) -> set[int]:
    """Process ids of an engine's ranks: they map the adapter's memory, and are not Ray's.

    Names do not tell: a process whose first environment variable was changed keeps its name, because setproctitle looks
    for the place by it.
    """
    files = mapped_files([process for process in processes if not name_of(process).startswith(RAY)])
    return {pid for pid, mapped in files.items() if any("memfd:adapter" in file for file in mapped)}
