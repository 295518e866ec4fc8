"""How many groups a second the driver and the replay can take: `python -m benchmarks.scale [--rollout 64] ...`.

Workers over Ray on this machine that only wait: each rollout worker finishes a group of 8 completions of 256 tokens
every `--every` seconds, each reward takes 10 ms a completion. Prints one JSON line for each `--every`: groups a second,
against what the workers could have made, the share of a core that the driver and the replay take, and their memory at
the beginning, ten times on the way and at the end.
"""

import argparse
import operator
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

from actors.pipeline import Pipeline
from actors.replay.queue import Replay
from actors.rollout import RolloutWorker
from actors.runtime.ray import RayRuntime
from actors.runtime.ray_cluster import Resources
from actors.runtime.supervisor import Supervisor, Timeouts
from actors.types import Adapter, Completion, Group, Prompt, Request, Sampling, Score, VersionSpan
from benchmarks.common import report

SAMPLES, TOKENS, PROMPT, BATCH = 8, 256, 110, 64
READINGS = 10  # of memory and processor time, on the way


class WaitingEngine:
    """Finishes the oldest request's group after `every` seconds."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._requests: list[Request] = []

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    @property
    def preemptions(self) -> int:
        return 0

    def submit(self, requests: Sequence[Request]) -> None:
        self._requests += requests

    def partial(self) -> dict[str, list[int]]:
        return {}

    def load_adapter(self, adapter: Adapter) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def step(self) -> list[Completion]:
        time.sleep(self._every)
        done, self._requests = self._requests[:SAMPLES], self._requests[SAMPLES:]
        tokens = tuple(random.choices(range(150_000), k=TOKENS))
        text = "a word " * (TOKENS // 2)
        return [
            Completion(r.request_id, tokens, (-1.5,) * TOKENS, text, "length", (VersionSpan(0, TOKENS),)) for r in done
        ]


class WaitingReward:
    """Takes 10 ms a completion."""

    def score(self, group: Group, evaluate: bool) -> Group:
        time.sleep(0.01 * len(group.trajectories))
        return replace(group, scores=tuple(Score(float(i % 2)) for i in range(len(group.trajectories))))


def make_rollout(every: float, name: str) -> RolloutWorker:
    return RolloutWorker(WaitingEngine(every), seed=0, name=name)


def make_replay(folder: Path) -> Replay:
    replay = Replay(folder, capacity=100_000)
    replay.recover(lambda _: False)
    return replay


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time so far, and memory in MiB."""

    seconds: float
    mib: float

    @classmethod
    def of(cls, process: psutil.Process) -> "Usage":
        times = process.cpu_times()
        return cls(times.user + times.system, process.memory_info().rss / 2**20)


class Readings:
    """What each of `processes` has used, READINGS times in `seconds` seconds from now on, and at the end."""

    def __init__(self, processes: Mapping[str, psutil.Process], seconds: float) -> None:
        self._processes = processes
        self._every = seconds / READINGS
        self._started = time.monotonic()
        self._usages: dict[str, list[Usage]] = {name: [] for name in processes}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def poll(self) -> None:
        """Read if it is time."""
        if self.elapsed >= len(self._usages["driver"]) * self._every:
            self.read()

    def read(self) -> None:
        for name, process in self._processes.items():
            self._usages[name].append(Usage.of(process))

    def columns(self) -> dict[str, object]:
        shares = {
            f"{name}_core_share": (usages[-1].seconds - usages[0].seconds) / self.elapsed
            for name, usages in self._usages.items()
        }
        return {**shares, **{f"{name}_mib": [round(u.mib) for u in usages] for name, usages in self._usages.items()}}


class Driver:
    """What the loop does with its workers, without a learner: a full batch is taken from the replay and dropped."""

    def __init__(self, supervisor: Supervisor, rollout_workers: int) -> None:
        self._pipeline = Pipeline(supervisor)
        self._replay = supervisor.slot("replay")
        self._in_flight_limit = 3 * rollout_workers
        self._started = self._in_flight = 0
        self._stored: list[int] = []
        self.accepted = 0

    def poll(self) -> None:
        count = self._in_flight_limit - self._in_flight
        if count:
            ordinals = range(self._started, self._started + count)
            prompts = [Prompt(ordinal, "q", tuple(range(PROMPT)), "q", "1", "") for ordinal in ordinals]
            self._pipeline.dispatch(prompts, Sampling(1.0, TOKENS), SAMPLES)
            self._started, self._in_flight = self._started + count, self._in_flight + count
        for admission in self._pipeline.poll():
            self._stored.append(admission.ordinal)
            self._in_flight -= 1
            self.accepted += 1
        if len(self._stored) >= BATCH:
            batch, self._stored = self._stored[:BATCH], self._stored[BATCH:]
            self._replay.submit(Replay.batch, batch, 0, 0)
            self._replay.submit(Replay.drop, batch)
            self._replay.submit(Replay.release, partial(operator.gt, min(batch)))


def run(runtime: RayRuntime, folder: Path, *, every: float, arguments: argparse.Namespace) -> None:
    supervisor = Supervisor(runtime, timeouts=Timeouts(), note=print)
    supervisor.start("rollout", arguments.rollout, lambda name: partial(make_rollout, every, name))
    supervisor.start("reward", arguments.reward, lambda _: WaitingReward)
    supervisor.start("replay", 1, lambda _: partial(make_replay, folder / f"journal-{every}"))
    driver, started = Driver(supervisor, arguments.rollout), time.monotonic()
    while driver.accepted < 2 * arguments.rollout:  # until all workers are busy
        driver.poll()
    start_seconds = time.monotonic() - started
    replays = [p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("ray::Replay")]
    readings = Readings({"driver": psutil.Process(), "replay": replays[-1]}, arguments.seconds)
    driver.accepted = 0
    while readings.elapsed < arguments.seconds:
        driver.poll()
        readings.poll()
    readings.read()
    report(
        benchmark="scale",
        rollout_workers=arguments.rollout,
        reward_workers=arguments.reward,
        every_s=every,
        seconds=readings.elapsed,
        start_s=start_seconds,
        groups_per_second=driver.accepted / readings.elapsed,
        offered_groups_per_second=arguments.rollout / every,
        **readings.columns(),
    )
    supervisor.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rollout", type=int, default=64)
    parser.add_argument("--reward", type=int, default=32)
    parser.add_argument("--every", type=float, nargs="+", default=[8.0, 4.0, 2.0, 1.0])
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    counts = {"rollout": arguments.rollout, "reward": arguments.reward, "replay": 1}
    with tempfile.TemporaryDirectory() as scratch:
        runtime = RayRuntime(folder=Path(scratch))
        for every in arguments.every:
            runtime.reserve({kind: Resources(n, 0.001) for kind, n in counts.items()}, 10.0)
            run(runtime, Path(scratch), every=every, arguments=arguments)
            runtime.release()
        runtime.close()


if __name__ == "__main__":
    main()
