"""The pipeline over Ray: what is sampled once is admitted once, whichever worker dies."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from actors.pipeline import Pipeline
from actors.replay.queue import Replay
from actors.runtime.supervisor import Supervisor, Timeouts, TooManyRestarts
from actors.types import Adapter, AdapterEntry, AdapterLayout, Prompt, Sampling
from conf.errors import UsageError
from tests.helpers import ray_workers
from tests.helpers.processes import (
    LOOPBACK,
    listening_addresses,
    ray_processes,
    wait_until_gone,
)
from tests.helpers.runs import wait_for

SAMPLES = 4


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


class Harness:
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
def harness(request: pytest.FixtureRequest, cluster: Callable, tmp_path: Path) -> Iterator[Harness]:
    """With other arguments if a test names them."""
    made = Harness(
        cluster, tmp_path, **{"reward": ray_workers.reward, "max_restarts": 3, **getattr(request, "param", {})}
    )
    yield made
    made.supervisor.close()
    made.runtime.release()


def test_groups_are_sampled_scored_and_admitted_once(harness: Harness):
    harness.sample(range(80))
    harness.check(range(80), restarts=0)


@pytest.mark.parametrize("kind", ["rollout", "reward", "replay"])
def test_a_worker_that_dies_at_work_is_replaced(harness: Harness, kind: str):
    harness.sample(range(80), lambda: harness.kill(kind))
    harness.check(range(80))
    assert len(ray_workers.pids(harness.folder, kind)) == {"rollout": 3, "reward": 3, "replay": 2}[kind]


@pytest.mark.parametrize("kind", ["rollout", "reward", "replay"])
def test_a_worker_that_dies_idle_is_replaced(harness: Harness, kind: str):
    harness.sample(range(5))
    harness.kill(kind)
    harness.sample(range(5, 80))
    harness.check(range(80))


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_replay_dies_before_or_after_a_write(harness: Harness, when: str):
    harness.sample(range(80), (harness.folder / f"die-{when}").touch)
    harness.check(range(80))


def test_a_hung_engine_is_ended_at_the_stall_deadline(harness: Harness):
    harness.sample(range(80), (harness.folder / "hang").touch)
    harness.check(range(80))
    assert any(re.search(r"no answer for \d+ s", note) for note in harness.notes)


@pytest.mark.parametrize("harness", [{"reward": ray_workers.slow_reward}], indirect=True)
def test_a_slow_reward_that_hangs_at_times_costs_samples_and_no_worker(harness: Harness):
    prompts = [Prompt(o, "", tuple(range(2, 6)), "", None, "") for o in range(40)]
    harness.pipeline.dispatch(prompts, Sampling(1.0, 6), SAMPLES)
    admissions = []
    while len(admissions) < 40:
        admissions += harness.pipeline.poll(seconds=0.1)
    accepted = {v.ordinal: v.unscorable for v in admissions if v.accepted}
    rows = harness.supervisor.slot("replay").submit(Replay.batch, sorted(accepted), 0, 0).result()
    assert sum(accepted.values()) > 0 and len(accepted) > 30 and not harness.notes
    assert rows.num_rows == SAMPLES * len(accepted) and rows.column("reward").null_count == sum(accepted.values())


def test_an_engine_that_raises_is_replaced(harness: Harness):
    harness.sample(range(80), (harness.folder / "broken").touch)
    harness.check(range(80))
    assert any("OSError: the engine's inner process is gone" in note for note in harness.notes)


@pytest.mark.parametrize("harness", [{"max_restarts": 1}], indirect=True)
def test_too_many_restarts_end_the_run_with_the_reason(harness: Harness):
    with pytest.raises(
        TooManyRestarts, match=r"rollout-0 was lost 2 times without an optimizer step in between; the last"
    ):
        for _ in range(3):
            harness.sample(range(10), lambda: harness.kill("rollout"))
            harness.accepted.clear()


def test_a_worker_that_replaces_another_has_the_current_adapter(harness: Harness):
    layout = AdapterLayout(1, 1.0, (AdapterEntry("m", "A", (1, 2), 0), AdapterEntry("m", "B", (2, 1), 2)))

    class Maker:
        def make(self, version: int) -> Adapter:
            return Adapter(version, layout, torch.zeros(4))

    maker = harness.runtime.start("learner", Maker, name="learner-0")
    harness.pipeline.broadcast(maker.submit(Maker.make, 7))
    harness.sample(range(80), lambda: harness.kill("rollout"))
    (replaced,) = [note.split()[1] for note in harness.notes]
    assert (harness.folder / f"{replaced}#1.adapters").read_text() == "7\n"
    spans = (
        harness.supervisor.slot("replay").submit(Replay.batch, list(range(80)), 7, 0).result().column("version_spans")
    )
    assert {span["version"] for row in spans.to_pylist() for span in row} == {7}


def test_more_workers_than_there_is_room_for_says_what_is_missing(cluster: Callable):
    with pytest.raises(UsageError, match=r"the cluster lacks .* after \d+ s; ask for fewer workers"):
        cluster(rollout=10_000)
