"""Runs on a cluster whose driver or learner is killed, again and again: every prompt is trained once."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import faults
from tests.helpers.processes import name_of, ray_processes
from tests.helpers.runs import Launched, overrides, rows, steps_of, trained_ordinals, wait_for

WORKERS = ("ray::Rollout", "ray::Reward", "ray::Replay", "ray::Recorder", "ray::Learner")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster that outlives its drivers; its processes are descendants of this one."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    assert found.address is not None
    yield found.address
    found.shutdown()


@pytest.fixture
def run(address: str, tiny_model: Path, tmp_path: Path) -> Iterator[Callable]:
    """Starts the run in `<tmp_path>/run`, or resumes it; no worker of it is left."""

    def start(*more: str, prepare: Callable[[], None] | None = None) -> Launched:
        settings = (
            "runtime=ray",
            f"runtime.address={address}",
            "evaluation.samples=0",
            "evaluation.max_prompts=1",
            *more,
        )
        return Launched(overrides(tiny_model, tmp_path / "run", *settings), tmp_path / "log", prepare)

    yield start
    wait_for(lambda: not [p for p in ray_processes() if name_of(p).startswith(WORKERS)])


@pytest.mark.nightly
def test_a_learner_ends_at_the_worst_places(run: Callable, tmp_path: Path):
    folder, settings = (
        tmp_path / "run",
        ("run.steps=20", "run.checkpoint_every=2", "runtime.learner_timeout_seconds=15"),
    )
    for place in faults.PLACES:
        running, done = run(*settings, prepare=faults.install), steps_of(folder)
        wait_for(lambda done=done: steps_of(folder) > done, seconds=120)
        (folder / place).touch()
        code, output = running.wait()
        assert code == 3 and "learner-0" in output and not (folder / place).exists(), output
    code, output = run(*settings).wait()
    assert code == 0, output
    assert trained_ordinals(folder, 20) == list(range(40))
    assert [row["step"] for row in rows(folder)] == list(range(1, 21))


@pytest.mark.nightly
def test_a_learner_that_dies_while_the_run_starts_ends_it_with_a_sentence(run: Callable, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "in the start").touch()
    code, output = run("run.steps=1", prepare=faults.install).wait()
    assert code == 3 and "error: learner-0: its process died" in output and "Traceback" not in output, output
    code, output = run("run.steps=1").wait()  # the folder is let go of
    assert code == 0, output


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_the_driver_dies_at_random_steps(seed: int, run: Callable, tmp_path: Path):
    folder, draw, met = tmp_path / "run", random.Random(seed), []
    settings = ("run.steps=60", "run.checkpoint_every=3", "runtime.max_staleness=1")
    for _ in range(5):
        running, done = run(*settings), steps_of(folder)
        wanted = done + draw.randrange(4)
        wait_for(lambda wanted=wanted: steps_of(folder) >= wanted)
        running.process.join(draw.uniform(0.0, 0.3))
        running.kill()
        met.append(steps_of(folder))
    assert 0 < met[-1] < 60, met  # the kills met a run that was getting on
    code, output = run(*settings).wait()
    assert code == 0, output
    assert trained_ordinals(folder, 60) == list(range(120))
