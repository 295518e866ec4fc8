"""Clusters that others run: machines that go and come, and what a user is told when one does not fit."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.pipeline import Pipeline
from actors.replay.queue import Replay
from actors.runtime import ray as ray_runtime
from actors.runtime.ray import RayRuntime
from actors.runtime.ray_cluster import Resources, local_versions
from actors.runtime.supervisor import Supervisor, Timeouts
from actors.types import Prompt, Sampling
from conf.errors import UsageError
from tests.helpers import ray_workers
from tests.helpers.runs import launch, overrides, wait_for

SAMPLES = 4


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster of two machines; a worker that takes a core leaves room for others on the driver's alone."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    found.add_node(num_cpus=1)
    yield found
    found.shutdown()


@pytest.fixture
def runtime(machines: Any, tmp_path: Path) -> Iterator[RayRuntime]:
    made = RayRuntime(folder=tmp_path, address=machines.address)
    yield made
    made.close()


def machine_of(pid: int, machines: Any) -> Any:
    """The node whose raylet started a process."""
    parents = {p.pid for p in psutil.Process(pid).parents()}
    (found,) = [
        node
        for node in [machines.head_node, *machines.worker_nodes]
        if {info.process.pid for info in node.all_processes["raylet"]} & parents
    ]
    return found


def test_a_machine_is_lost_and_another_joins(runtime: RayRuntime, machines: Any, tmp_path: Path):
    runtime.reserve(
        {"rollout": Resources(2, 1.0), "reward": Resources(1, 0.1), "replay": Resources(1, 0.1, with_driver=True)}, 30.0
    )
    notes: list[str] = []
    supervisor = Supervisor(runtime, timeouts=Timeouts(60.0, 10.0, max_restarts=3), note=notes.append)
    pipeline = Pipeline(supervisor)
    supervisor.start("reward", 1, lambda name: partial(ray_workers.reward, tmp_path, name))
    supervisor.start("rollout", 2, lambda name: partial(ray_workers.rollout, tmp_path, name))
    supervisor.start("replay", 1, lambda name: partial(ray_workers.replay, tmp_path, name))
    wait_for(lambda: len(ray_workers.pids(tmp_path, "rollout")) == 2)
    places = {name: machine_of(pid, machines) for name, pid in ray_workers.pids(tmp_path, "rollout").items()}
    ((lost, machine),) = [(name, node) for name, node in places.items() if node is not machines.head_node]

    accepted: list[int] = []

    def sample(ordinals: range, until: Callable[[], bool]) -> None:
        prompts = [Prompt(o, "", tuple(range(2, 6)), "", None, "") for o in ordinals]
        pipeline.dispatch(prompts, Sampling(1.0, 6), SAMPLES)
        deadline = time.monotonic() + 60
        while not until():
            accepted.extend(v.ordinal for v in pipeline.poll(seconds=0.1) if v.accepted)
            assert time.monotonic() < deadline, (accepted, notes)

    sample(range(60), lambda: len(accepted) >= 5)
    machines.remove_node(machine, allow_graceful=False)
    sample(range(60, 80), lambda: len(accepted) >= 50)
    machines.add_node(num_cpus=1)
    sample(range(80, 100), lambda: len(accepted) >= 100)
    sample(range(0), lambda: any(name.startswith(f"{lost}#") for name in ray_workers.pids(tmp_path, "rollout")))
    assert sorted(accepted) == list(range(100))
    replay = supervisor.slot("replay")
    rows = supervisor.retry_on_worker_loss(lambda: replay.submit(Replay.batch, list(range(100)), 0, 0).result())
    assert rows.column("sample").to_pylist() == list(range(SAMPLES)) * 100
    assert any(note.startswith(f"lost {lost} ") for note in notes)
    supervisor.close()


def test_a_machine_with_other_versions_is_named(runtime: RayRuntime, monkeypatch: pytest.MonkeyPatch):
    runtime.reserve({"reward": Resources(1, 0.1)}, 30.0)
    versions = local_versions() | {"torch": "0.1"}
    monkeypatch.setattr(ray_runtime, "local_versions", lambda: versions)
    worker = runtime.start("reward", dict, name="reward-0")
    with pytest.raises(UsageError, match=r"has torch \S+, the driver 0.1: install the same on every machine$"):
        worker.submit(dict.copy).result()


def test_a_cluster_that_lacks_gpus_says_how_many_and_how_long_it_waited(runtime: RayRuntime):
    with pytest.raises(UsageError, match=r"the cluster lacks 2 GPU after 1 s; ask for fewer workers"):
        runtime.reserve({"rollout": Resources(2, 0.1, gpus=1.0)}, 1.0)


def test_an_address_where_no_cluster_is_says_so(tmp_path: Path):
    with pytest.raises(UsageError, match=r"^runtime.address=127.0.0.1:1: .*"):
        RayRuntime(folder=tmp_path, address="127.0.0.1:1")


def test_a_reward_that_workers_cannot_import_is_named(tiny_model: Path, tmp_path: Path):
    output = launch(
        overrides(tiny_model, tmp_path / "run", "runtime=ray", "reward.terms=[{fn: 'no_such_rewards:score'}]"), expect=2
    )
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no_such_rewards" in errors[0], output


def test_a_run_folder_that_machines_do_not_share_is_refused(tiny_model: Path, tmp_path: Path):
    from conf.schema import Settings
    from epiphany.assembly import make_learner
    from learner.parallel.data_parallel import DataParallel

    (tmp_path / "lock").write_text("1\n")
    with pytest.raises(UsageError, match=rf"is another place for the learner on {os.uname().nodename}: choose one"):
        make_learner(Settings(), tmp_path / "checkpoints", "2\n", ranks=DataParallel())
