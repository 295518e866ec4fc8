"""The road over Ray: what is sampled once is admitted once, whoever dies on the way."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from actors.pipeline import Limits, Pipeline, TooManyLost
from actors.replay import Replay
from actors.types import Adapter, AdapterEntry, AdapterLayout, Prompt, Sampling
from conf.errors import UsageError
from tests.pipeline import crew
from tests.pipeline.runs import Launched, final, launch, overrides, rows, steps_of, trained_ordinals, wait_for
from tests.tiny import make_tiny_model

SAMPLES = 4
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Reserves room on one Ray cluster of this module's own; nothing of it is left afterwards."""
    folder = tmp_path_factory.mktemp("ray")
    import ray

    from actors.ray_runtime import RayRuntime, Resources

    before = ours()
    runtime = RayRuntime(folder=folder)

    def make(**counts: int) -> RayRuntime:
        runtime.reserve({kind: Resources(n, 0.05) for kind, n in counts.items()}, 5.0)
        return runtime

    yield make
    addresses = listening()
    runtime.close()
    assert addresses <= LOOPBACK
    wait_for(lambda: not ours() - before)
    assert not ray.is_initialized()


def listening() -> set[str]:
    """Addresses on which any of our processes can be reached."""
    return {c.laddr.ip for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in ours()}


def ours() -> set[int]:
    """Processes of Ray."""
    names = ("ray::", "raylet", "gcs_server")
    alive = [p.info for p in psutil.process_iter(["pid", "name", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
    return {info["pid"] for info in alive if (info["name"] or "").startswith(names)}


class Road:
    """A pipeline over a fresh folder, and what it is to sample."""

    def __init__(self, cluster: Callable, folder: Path, reward: Callable) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.runtime = cluster(rollout=2, reward=2, replay=1, learner=1)
        self.pipeline = Pipeline(self.runtime, limits=Limits(60.0, 5.0, losses=3), note=self.notes.append)
        self.pipeline.start("reward", 2, lambda name: partial(reward, folder, name))
        self.pipeline.start("rollout", 2, lambda name: partial(crew.rollout, folder, name))
        self.pipeline.start("replay", 1, lambda name: partial(crew.replay, folder, name))
        self.accepted: list[int] = []
        for kind, count in (("reward", 2), ("rollout", 2), ("replay", 1)):
            wait_for(lambda kind=kind, count=count: len(crew.pids(folder, kind)) == count)

    def sample(self, ordinals: range, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until every group of `ordinals` was admitted; `meanwhile` happens after the first."""
        prompts = [Prompt(o, "", tuple(range(2, 6)), "", None, "") for o in ordinals]
        self.pipeline.dispatch(prompts, Sampling(1.0, 6), SAMPLES)
        wanted, deadline, did = len(self.accepted) + len(ordinals), time.monotonic() + 50, False
        while len(self.accepted) < wanted:
            verdicts = self.pipeline.work(seconds=0.1)
            self.accepted += [v.ordinal for v in verdicts if v.accepted]
            if self.accepted and not did:
                meanwhile()
                did = True
            assert time.monotonic() < deadline, (self.accepted, self.notes)

    def kill(self, kind: str) -> None:
        """The first of a kind: the one that is chosen where two have as much to do."""
        name = self.pipeline.one(kind).name
        wait_for(lambda: name in crew.pids(self.folder, kind))
        os.kill(crew.pids(self.folder, kind)[name], signal.SIGKILL)

    def check(self, ordinals: range, losses: int = 1) -> None:
        """Each ordinal once, with all its samples, in the journal as in the replay."""
        assert sorted(self.accepted) == list(ordinals)
        rows = self.pipeline.one("replay").submit(Replay.batch, list(ordinals), 0, 0).result()
        assert rows.column("ordinal").to_pylist() == [o for o in ordinals for _ in range(SAMPLES)]
        assert rows.column("sample").to_pylist() == list(range(SAMPLES)) * len(ordinals)
        assert sum("another takes its place" in note for note in self.notes) == losses, self.notes
        self.pipeline.close()
        journal = Replay(self.folder / "journal", capacity=1000)
        journal.recover(lambda _: True)
        assert journal.held() == list(ordinals)


@pytest.fixture
def road(request: pytest.FixtureRequest, cluster: Callable, tmp_path: Path) -> Iterator[Road]:
    """With another reward where a test names one."""
    made = Road(cluster, tmp_path, getattr(request, "param", crew.reward))
    yield made
    made.pipeline.close()
    made.runtime.release()


def test_groups_are_sampled_scored_and_admitted_once(road: Road):
    road.sample(range(80))
    road.check(range(80), losses=0)


@pytest.mark.parametrize("kind", ["rollout", "reward", "replay"])
def test_a_worker_that_dies_at_work_is_replaced(road: Road, kind: str):
    road.sample(range(80), lambda: road.kill(kind))
    road.check(range(80))
    assert len(crew.pids(road.folder, kind)) == {"rollout": 3, "reward": 3, "replay": 2}[kind]


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
    assert any("no answer for 5 s" in note or "no answer for 6 s" in note for note in road.notes)


@pytest.mark.parametrize("road", [crew.slow_reward], indirect=True)
def test_a_slow_reward_that_hangs_at_times_costs_samples_and_no_worker(road: Road):
    prompts = [Prompt(o, "", tuple(range(2, 6)), "", None, "") for o in range(40)]
    road.pipeline.dispatch(prompts, Sampling(1.0, 6), SAMPLES)
    verdicts = []
    while len(verdicts) < 40:
        verdicts += road.pipeline.work(seconds=0.1)
    accepted = {v.ordinal: v.unscorable for v in verdicts if v.accepted}
    rows = road.pipeline.one("replay").submit(Replay.batch, sorted(accepted), 0, 0).result()
    assert sum(accepted.values()) > 0 and len(accepted) > 30 and not road.notes
    assert rows.num_rows == SAMPLES * len(accepted) and rows.column("reward").null_count == sum(accepted.values())


def test_an_engine_that_raises_is_replaced(road: Road):
    road.sample(range(80), (road.folder / "broken").touch)
    road.check(range(80))
    assert any("OSError: the engine's inner process is gone" in note for note in road.notes)


def test_too_many_losses_end_the_run_with_the_reason(road: Road):
    road.pipeline._limits = Limits(60.0, 5.0, losses=1)
    with pytest.raises(TooManyLost, match=r"rollout-0 was lost 2 times without a step in between; the last time: "):
        for _ in range(3):
            road.sample(range(10), lambda: road.kill("rollout"))
            road.accepted.clear()


def test_a_worker_that_replaces_another_has_the_current_adapter(road: Road):
    layout = AdapterLayout(1, 1.0, (AdapterEntry("m", "A", (1, 2), 0), AdapterEntry("m", "B", (2, 1), 2)))

    class Maker:
        def make(self, version: int) -> Adapter:
            return Adapter(version, layout, torch.zeros(4))

    maker = road.runtime.start("learner", Maker, name="learner-0")
    road.pipeline.broadcast(7, maker.submit(Maker.make, 7))
    road.sample(range(80), lambda: road.kill("rollout"))
    (replaced,) = [note.split()[1] for note in road.notes]
    assert (road.folder / f"{replaced}#1.adapters").read_text() == "7\n"
    spans = road.pipeline.one("replay").submit(Replay.batch, list(range(80)), 7, 0).result().column("version_spans")
    assert {span["version"] for row in spans.to_pylist() for span in row} == {7}


def test_more_workers_than_there_is_room_for_says_what_is_missing(cluster: Callable):
    with pytest.raises(UsageError, match=r"the cluster lacks .* after \d+ s; ask for fewer workers"):
        cluster(rollout=10_000)


# Whole runs


def test_a_run_over_ray_gives_the_numbers_of_one_process(tiny_model: Path, tmp_path: Path):
    launch(overrides(tiny_model, tmp_path / "local", "hardware.threads=1"))
    many = ["runtime=ray", "runtime.rollout_workers=2", "runtime.learner_ranks=2"]
    launch(overrides(tiny_model, tmp_path / "ray", *many))
    for one, other in zip(rows(tmp_path / "local"), rows(tmp_path / "ray"), strict=True):
        assert one["reward"] == other["reward"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6) and other["mismatch"] < 1e-3
    adapters = [final(tmp_path / name, 4)[0] for name in ("local", "ray")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_learner_or_the_driver_dies_and_the_run_goes_on_from_the_checkpoint(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    arguments = overrides(
        tiny_model, folder, "runtime=ray", "run.steps=60", "runtime.max_staleness=1", "evaluation.samples=0",
        "runtime.learner_ranks=2",
    )  # fmt: skip
    before = ours()

    def started(steps: int) -> Launched:
        running = Launched(arguments, tmp_path / f"log-{steps}")
        wait_for(lambda: steps_of(folder) >= steps, 120)
        return running

    running = started(3)
    assert f"running as process {running.pid}" in launch(["task=status", f"run={folder}"])
    assert listening() <= LOOPBACK
    learners = [p for p in ours() - before if psutil.Process(p).name().startswith("ray::Learner")]
    assert len(learners) == 2
    os.kill(max(learners), signal.SIGKILL)
    code, output = running.wait()
    assert code == 3 and "the same command goes on from the last checkpoint" in output, output
    done = len(rows(folder))
    running = started(done + 3)
    os.kill(running.pid, signal.SIGKILL)
    running.process.join()
    launch(arguments)
    assert trained_ordinals(folder, 60) == list(range(120))
    wait_for(lambda: not ours() - before, 150)  # Ray's agents look for their raylet once a minute


def test_an_engine_over_two_devices_learns_over_ray_and_leaves_nothing(tmp_path: Path):
    """One of its processes is killed on the way."""
    before = set(Path("/dev/shm").iterdir())
    model = make_tiny_model(tmp_path / "model", hidden=256)
    more = ["runtime=ray", "engine.name=vllm", "engine.tensor_parallel_size=2", "run.steps=40", "evaluation.samples=0"]
    folder = tmp_path / "run"
    running = Launched(overrides(model, folder, *more), tmp_path / "log")
    wait_for(lambda: steps_of(folder), 120)
    os.kill(devices()[0], signal.SIGKILL)
    code, output = running.wait()
    assert code == 0 and "lost rollout-0 (RuntimeError" in output, output
    assert 0 < max(row["mismatch"] for row in rows(folder)) < 1e-3 and trained_ordinals(folder, 40) == list(range(80))
    wait_for(lambda: not devices())
    wait_for(lambda: not set(Path("/dev/shm").iterdir()) - before)


def devices() -> list[int]:
    """Processes of engines that are spread over several, without the one that spreads them.

    Known by the adapter's memory, which they share: a process whose first environment variable was changed keeps its name
    (setproctitle finds the place by it), and in Ray's workers which is the first differs from run to run.
    """
    maps = {p.pid: p.info["memory_maps"] or () for p in psutil.process_iter(["memory_maps"])}
    return [pid for pid in maps.keys() - ours() if any("memfd:adapter" in part.path for part in maps[pid])]
