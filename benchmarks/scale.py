"""How many groups a second the driver and the replay can take: `python -m benchmarks.scale [--rollout 64] [--reward 32]`.

Workers over Ray on this machine that only wait: each rollout worker finishes a group of 8 completions of 256 tokens every
`--every` seconds, each reward takes 10 ms a completion. Prints one JSON line for each `--every`: groups a second, against
what the workers could have made, the share of a core that the driver and the replay take, and their memory at the
beginning, ten times on the way and at the end.
"""

import argparse
import operator
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from actors.pipeline import Limits, Pipeline
from actors.ray_runtime import RayRuntime, Resources
from actors.replay import Replay
from actors.rollout import RolloutWorker
from actors.types import Adapter, Completion, Group, Prompt, Request, Sampling, Score, VersionSpan
from benchmarks.common import report

SAMPLES, TOKENS, PROMPT, BATCH = 8, 256, 110, 64


class WaitingEngine:
    """Finishes the oldest request's group after `every` seconds."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._requests: list[Request] = []

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def submit(self, requests: Sequence[Request]) -> None:
        self._requests += requests

    def load_adapter(self, adapter: Adapter) -> None: ...

    def release_cache(self) -> None: ...

    def restore_cache(self) -> None: ...

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
        time.sleep(0.01 * len(group.completions))
        return replace(group, scores=tuple(Score(float(i % 2)) for i in range(len(group.completions))))


def make_rollout(every: float, name: str) -> RolloutWorker:
    return RolloutWorker(WaitingEngine(every), seed=0, name=name)


def make_replay(folder: Path) -> Replay:
    made = Replay(folder, capacity=100_000)
    made.recover(lambda _: False)
    return made


def usage(processes: dict[str, psutil.Process]) -> dict[str, tuple[float, float]]:
    """Seconds of CPU so far, and MiB held, of each."""
    found = {}
    for name, process in processes.items():
        times = process.cpu_times()
        found[name] = (times.user + times.system, process.memory_info().rss / 2**20)
    return found


def run(runtime: RayRuntime, folder: Path, every: float, seconds: float, rollout: int, reward: int) -> None:
    pipeline = Pipeline(runtime, limits=Limits(), note=print)
    pipeline.start("rollout", rollout, lambda name: partial(make_rollout, every, name))
    pipeline.start("reward", reward, lambda _: WaitingReward)
    pipeline.start("replay", 1, lambda _: partial(make_replay, folder / f"journal-{every}"))
    sampling, ordinal, held, accepted = Sampling(1.0, TOKENS), 0, 0, 0
    ready: list[int] = []
    started, since, seen, processes = time.monotonic(), 0.0, [], {}
    while not since or time.monotonic() - since < seconds:
        if held < 3 * rollout:
            count = 3 * rollout - held
            prompts = [Prompt(o, "q", tuple(range(PROMPT)), "q", "1", "") for o in range(ordinal, ordinal + count)]
            pipeline.dispatch(prompts, sampling, SAMPLES)
            ordinal, held = ordinal + count, held + count
        for verdict in pipeline.work():
            ready.append(verdict.ordinal)
            held -= 1
            accepted += 1
        if len(ready) >= BATCH:
            batch, ready = ready[:BATCH], ready[BATCH:]
            replay = pipeline.one("replay")
            replay.submit(Replay.batch, batch, 0, 0)
            replay.submit(Replay.drop, batch)
            replay.submit(Replay.release, partial(operator.gt, min(batch)))
        if not since and accepted >= 2 * rollout:  # all are at work
            actors = [p for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("ray::Replay")]
            processes = {"driver": psutil.Process(), "replay": actors[-1]}
            since, accepted = time.monotonic(), 0
        if since and time.monotonic() - since >= len(seen) * seconds / 10:
            seen.append(usage(processes))
    took = time.monotonic() - since
    seen.append(usage(processes))
    report(
        benchmark="scale", rollout_workers=rollout, reward_workers=reward, every_s=every, seconds=took,
        start_s=since - started, groups_per_second=accepted / took, offered_groups_per_second=rollout / every,
        **{f"{name}_core_share": (seen[-1][name][0] - seen[0][name][0]) / took for name in processes},
        **{f"{name}_mib": [round(at[name][1]) for at in seen] for name in processes},
    )  # fmt: skip
    pipeline.close()


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
            run(runtime, Path(scratch), every, arguments.seconds, arguments.rollout, arguments.reward)
            runtime.release()
        runtime.close()


if __name__ == "__main__":
    main()
