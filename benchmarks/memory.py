"""The memory plan beside what is used, stage by stage: `python -m benchmarks.memory [case] [override ...]`.

For a case of benchmarks/work.py: the plan, and a JSON line for each stage of two steps. `process` is what the driver
counts, `outside` what of it torch does not: context, libraries, graphs. Needs a GPU that nothing else uses.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from actors.types import Sampling
from benchmarks.common import build_workers, report, sample_all
from benchmarks.gpu_memory import GIB, MemorySampler, gib_in_use, gib_in_use_by_others
from benchmarks.work import CASES, prompts_of, random_rollouts, work_settings

T = TypeVar("T")


class Stages:
    """Runs the stages of `case` and reports the memory of each. `before` (GiB) is what other processes use."""

    def __init__(self, case: str, overrides: list[str], before: float) -> None:
        self._case = case
        self._overrides = overrides
        self._before = before
        self.planned_gib: float | None = None
        self._sampler = MemorySampler()

    def run(self, name: str, action: Callable[[], T], *, unmapped: float = 0.0, **more: object) -> T:
        """What `action` returns; `more` is reported, too. `unmapped`: GiB that torch still counts as its own and the
        driver does not.
        """
        torch.cuda.reset_peak_memory_stats()
        since, start = len(self._sampler.samples), time.perf_counter()
        result = action()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        process, reserved = gib_in_use() - self._before, torch.cuda.memory_reserved() / GIB - unmapped
        report(
            benchmark="memory",
            case=self._case,
            overrides=self._overrides,
            stage=name,
            planned_gib=self.planned_gib,
            seconds=seconds,
            **more,
            process_gib=process,
            process_gib_highest=max((gib for _, gib in self._sampler.samples[since:]), default=0.0) - self._before,
            outside_gib=process - reserved,
            reserved_gib=reserved,
            reserved_gib_highest=torch.cuda.max_memory_reserved() / GIB - unmapped,
            allocated_gib=torch.cuda.memory_allocated() / GIB - unmapped,
            allocated_gib_highest=torch.cuda.max_memory_allocated() / GIB - unmapped,
        )
        return result

    def finish(self) -> None:
        self._sampler.finish()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    parser.add_argument("--sampled", type=int, default=2**30, help="tokens of an answer that are sampled at most")
    parser.add_argument("--steps", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    before = gib_in_use_by_others()
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings(arguments.case, Path(folder), *overrides)
        stages = Stages(arguments.case, overrides, before)
        stages.run("context", lambda: torch.zeros(1, device="cuda"))
        workers = stages.run("workers", lambda: build_workers(settings))
        plan, engine, learner = workers.plan, workers.engine, workers.learner
        print("\n".join(plan.lines()), flush=True)
        stages.planned_gib = plan.card.total / GIB if plan.card else None
        free = psutil.virtual_memory().available / GIB
        print(f"{free:.1f} GiB of the host's memory are free", flush=True)
        table = random_rollouts(settings, plan.shape.vocabulary)
        tokens = min(settings.sampling.max_tokens, arguments.sampled)
        sampling = Sampling(settings.sampling.temperature, tokens)
        prompts = prompts_of(table)
        unmapped = plan.way.kv_cache_bytes / GIB if plan.way.sleep_mode else 0.0
        for step in range(1, 1 + arguments.steps):
            stages.run(f"rollout {step}", lambda: sample_all(engine, prompts, sampling), tokens=tokens * len(prompts))
            engine.sleep()
            stats = stages.run(f"learner {step}", lambda: learner.step(table), unmapped=unmapped)
            print(f"{stats.stream_tokens} tokens", flush=True)
            stages.run(f"wake {step}", engine.wake)
            stages.run(f"update {step}", lambda: engine.load_adapter(learner.adapter()))
        stages.finish()


if __name__ == "__main__":
    main()
