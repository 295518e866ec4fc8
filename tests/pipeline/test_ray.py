"""The pipeline over Ray: what is sampled once is admitted once, whichever worker dies."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from actors.pipeline import Pipeline
from actors.replay.queue import Replay
from actors.runtime.supervisor import Supervisor, Timeouts, TooManyRestarts
from actors.types import Adapter, AdapterEntry, AdapterLayout, Prompt, Sampling
from conf.errors import UsageError
from tests.helpers import ray_workers
from tests.helpers.processes import (
    RAY,
    family,
    listening_addresses,
    mapped_files,
    name_of,
    ray_processes,
    wait_until_gone,
)
from tests.helpers.runs import Launched, final, launch, overrides, rows, steps_of, trained_ordinals, wait_for
from tests.helpers.tiny import make_tiny_model

SAMPLES = 4
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Reserves room on one Ray cluster of this module's own; nothing of it is left afterwards."""
    folder = tmp_path_factory.mktemp("ray")
    import ray

    from actors.runtime.ray import RayRuntime
    from actors.runtime.ray_cluster import Resources

    runtime = RayRuntime(folder=folder)

    def make(**counts: int) -> RayRuntime:
        runtime.reserve({kind: Resources(n, 0.05) for kind, n in counts.items()}, 5.0)
        return runtime

    yield make
    processes = ray_processes()
    addresses = listening_addresses(processes)
    runtime.close()
    assert processes and addresses <= LOOPBACK
    wait_until_gone(processes)
    assert not ray.is_initialized()


class Road:
    """A pipeline over a fresh folder, and what it is to sample."""

    def __init__(self, cluster: Callable, folder: Path, reward: Callable, max_restarts: int) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.runtime = cluster(rollout=2, reward=2, replay=1, learner=1)
        timeouts = Timeouts(60.0, 5.0, max_restarts=max_restarts)
        self.supervisor = Supervisor(self.runtime, timeouts=timeouts, note=self.notes.append)
        self.pipeline = Pipeline(self.supervisor)
        self.supervisor.start("reward", 2, lambda name: partial(reward, folder, name))
        self.supervisor.start("rollout", 2, lambda name: partial(ray_workers.rollout, folder, name))
        self.supervisor.start("replay", 1, lambda name: partial(ray_workers.replay, folder, name))
        self.accepted: list[int] = []
        for kind, count in (("reward", 2), ("rollout", 2), ("replay", 1)):
            wait_for(lambda kind=kind, count=count: len(ray_workers.pids(folder, kind)) == count)

    def sample(self, ordinals: range, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until every group of `ordinals` was admitted; `meanwhile` happens once the first was sampled."""
        prompts = [Prompt(o, "", tuple(range(2, 6)), "", None, "") for o in ordinals]
        self.pipeline.dispatch(prompts, Sampling(1.0, 6), SAMPLES)
        expected, deadline, did = len(self.accepted) + len(ordinals), time.monotonic() + 50, False
        while len(self.accepted) < expected:
            self.accepted += [admission.ordinal for admission in self.pipeline.poll(seconds=0.1) if admission.accepted]
            counters = self.pipeline.take_counters()
            sampling = sum(line.get("in_flight", 0) for name, line in counters.items() if name.startswith("rollout"))
            if sampling < len(ordinals) and not did:
                meanwhile()
                did = True
            assert time.monotonic() < deadline, (self.accepted, self.notes)

    def kill(self, kind: str) -> None:
        """The first of a kind: the one that is chosen where two have as much to do."""
        name = self.supervisor.slot(kind).handle.name
        wait_for(lambda: name in ray_workers.pids(self.folder, kind))
        os.kill(ray_workers.pids(self.folder, kind)[name], signal.SIGKILL)

    def check(self, ordinals: range, restarts: int = 1) -> None:
        """Each ordinal once, with all its samples, in the journal as in the replay."""
        assert sorted(self.accepted) == list(ordinals)
        rows = self.supervisor.slot("replay").submit(Replay.batch, list(ordinals), 0, 0).result()
        assert rows.column("ordinal").to_pylist() == [o for o in ordinals for _ in range(SAMPLES)]
        assert rows.column("sample").to_pylist() == list(range(SAMPLES)) * len(ordinals)
        assert sum("it is replaced" in note for note in self.notes) == restarts, self.notes
        self.supervisor.close()
        journal = Replay(self.folder / "journal", capacity=1000)
        journal.recover(lambda _: True)
        assert journal.held() == list(ordinals)


@pytest.fixture
def road(request: pytest.FixtureRequest, cluster: Callable, tmp_path: Path) -> Iterator[Road]:
    """With other arguments if a test names them."""
    made = Road(cluster, tmp_path, **{"reward": ray_workers.reward, "max_restarts": 3, **getattr(request, "param", {})})
    yield made
    made.supervisor.close()
    made.runtime.release()


def test_groups_are_sampled_scored_and_admitted_once(road: Road):
    road.sample(range(80))
    road.check(range(80), restarts=0)


@pytest.mark.parametrize("kind", ["rollout", "reward", "replay"])
def test_a_worker_that_dies_at_work_is_replaced(road: Road, kind: str):
    road.sample(range(80), lambda: road.kill(kind))
    road.check(range(80))
    assert len(ray_workers.pids(road.folder, kind)) == {"rollout": 3, "reward": 3, "replay": 2}[kind]


@pytest.mark.parametrize("kind", ["rollout", "reward", "replay"])
def test_a_worker_that_dies_idle_is_replaced(road: Road, kind: str):
    road.sample(range(5))
    road.kill(kind)
    road.sample(range(5, 80))
    road.check(range(80))


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_replay_dies_before_or_after_a_write(road: Road, when: str):
    road.sample(range(80), (road.folder / f"die-{when}").touch)
    road.check(range(80))


def test_a_hung_engine_is_ended_at_the_stall_deadline(road: Road):
    road.sample(range(80), (road.folder / "hang").touch)
    road.check(range(80))
    assert any(re.search(r"no answer for \d+ s", note) for note in road.notes)


@pytest.mark.parametrize("road", [{"reward": ray_workers.slow_reward}], indirect=True)
def test_a_slow_reward_that_hangs_at_times_costs_samples_and_no_worker(road: Road):
    prompts = [Prompt(o, "", tuple(range(2, 6)), "", None, "") for o in range(40)]
    road.pipeline.dispatch(prompts, Sampling(1.0, 6), SAMPLES)
    admissions = []
    while len(admissions) < 40:
        admissions += road.pipeline.poll(seconds=0.1)
    accepted = {v.ordinal: v.unscorable for v in admissions if v.accepted}
    rows = road.supervisor.slot("replay").submit(Replay.batch, sorted(accepted), 0, 0).result()
    assert sum(accepted.values()) > 0 and len(accepted) > 30 and not road.notes
    assert rows.num_rows == SAMPLES * len(accepted) and rows.column("reward").null_count == sum(accepted.values())


def test_an_engine_that_raises_is_replaced(road: Road):
    road.sample(range(80), (road.folder / "broken").touch)
    road.check(range(80))
    assert any("OSError: the engine's inner process is gone" in note for note in road.notes)


@pytest.mark.parametrize("road", [{"max_restarts": 1}], indirect=True)
def test_too_many_restarts_end_the_run_with_the_reason(road: Road):
    with pytest.raises(
        TooManyRestarts, match=r"rollout-0 was lost 2 times without an optimizer step in between; the last"
    ):
        for _ in range(3):
            road.sample(range(10), lambda: road.kill("rollout"))
            road.accepted.clear()


def test_a_worker_that_replaces_another_has_the_current_adapter(road: Road):
    layout = AdapterLayout(1, 1.0, (AdapterEntry("m", "A", (1, 2), 0), AdapterEntry("m", "B", (2, 1), 2)))

    class Maker:
        def make(self, version: int) -> Adapter:
            return Adapter(version, layout, torch.zeros(4))

    maker = road.runtime.start("learner", Maker, name="learner-0")
    road.pipeline.broadcast(maker.submit(Maker.make, 7))
    road.sample(range(80), lambda: road.kill("rollout"))
    (replaced,) = [note.split()[1] for note in road.notes]
    assert (road.folder / f"{replaced}#1.adapters").read_text() == "7\n"
    spans = road.supervisor.slot("replay").submit(Replay.batch, list(range(80)), 7, 0).result().column("version_spans")
    assert {span["version"] for row in spans.to_pylist() for span in row} == {7}


def test_more_workers_than_there_is_room_for_says_what_is_missing(cluster: Callable):
    with pytest.raises(UsageError, match=r"the cluster lacks .* after \d+ s; ask for fewer workers"):
        cluster(rollout=10_000)


# Whole runs


def test_a_run_over_ray_gives_the_numbers_of_one_process(tiny_model: Path, tmp_path: Path):
    launch(overrides(tiny_model, tmp_path / "local", "hardware.threads=1"))
    many = ["runtime=ray", "runtime.rollout_workers=2", "runtime.learner_data_parallel_size=2"]
    launch(overrides(tiny_model, tmp_path / "ray", *many))
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
        "run.steps=60",
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
    assert trained_ordinals(folder, 60) == list(range(120))
    # Ray's agents look for their raylet once a minute; workers and daemons end at once.
    wait_until_gone([process for process in processes if name_of(process).startswith(("ray::", "raylet", "gcs"))])


@pytest.mark.nightly
def test_an_engine_over_two_devices_learns_over_ray_and_leaves_nothing(tmp_path: Path):
    """One of its processes is killed on the way."""
    model = make_tiny_model(tmp_path / "model", hidden=256)
    more = ["runtime=ray", "engine.name=vllm", "engine.tensor_parallel_size=2", "run.steps=40", "evaluation.samples=0"]
    folder = tmp_path / "run"
    running = Launched(overrides(model, folder, *more), tmp_path / "log")
    wait_for(lambda: steps_of(folder), 120)
    processes = family(running.pid)
    ranks = [process for process in processes if process.pid in ranks_among(processes)]
    shared = {file for files in mapped_files(processes).values() for file in files if file.startswith("/dev/shm/")}
    ranks[0].kill()
    code, output = running.wait()
    assert code == 0 and "lost rollout-0 (RuntimeError" in output, output
    assert 0 < max(row["logprob_gap"] for row in rows(folder)) < 1e-3
    assert trained_ordinals(folder, 40) == list(range(80))
    wait_until_gone(ranks)
    wait_for(lambda: not any(Path(file).exists() for file in shared))


def ranks_among(processes: list[psutil.Process]) -> set[int]:
    """Process ids of an engine's ranks: they map the adapter's memory, and are not Ray's.

    Names do not tell: a process whose first environment variable was changed keeps its name, because setproctitle looks
    for the place by it.
    """
    files = mapped_files([process for process in processes if not name_of(process).startswith(RAY)])
    return {pid for pid, mapped in files.items() if any("memfd:adapter" in file for file in mapped)}
