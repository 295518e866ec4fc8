"""The memory plan beside what is used, stage by stage: `python -m benchmarks.memory [case] [override ...]`.

For a case of benchmarks/work.py: the plan, and a JSON line for each stage of two steps. `process` is what the driver
counts, `outside` what of it torch does not: context, libraries, graphs. Needs a GPU that nothing else uses.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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
        self._sampler = MemorySampler()

    def run(self, name: str, action: Callable[[], T], *, unmapped: float = 0.0) -> T:
        """What `action` returns. `unmapped`: GiB that torch still counts as its own and the driver does not."""
        torch.cuda.reset_peak_memory_stats()
        since = len(self._sampler.samples)
        result = action()
        torch.cuda.synchronize()
        process, reserved = gib_in_use() - self._before, torch.cuda.memory_reserved() / GIB - unmapped
        report(
            benchmark="memory",
            case=self._case,
            overrides=self._overrides,
            stage=name,
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
    arguments, overrides = parser.parse_known_args()
    before = gib_in_use_by_others()
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings(arguments.case, Path(folder), *overrides)
        stages = Stages(arguments.case, overrides, before)
        stages.run("context", lambda: torch.zeros(1, device="cuda"))
        workers = stages.run("workers", lambda: build_workers(settings))
        plan, engine, learner = workers.plan, workers.engine, workers.learner
        print("\n".join(plan.lines()), flush=True)
        table = random_rollouts(settings, plan.shape.vocabulary)
        sampling = Sampling(settings.sampling.temperature, settings.sampling.max_tokens)
        prompts = prompts_of(table)
        unmapped = plan.way.kv_cache_bytes / GIB if plan.way.sleep_mode else 0.0
        for step in (1, 2):
            stages.run(f"rollout {step}", lambda: sample_all(engine, prompts, sampling))
            engine.sleep()
            stages.run(f"learner {step}", lambda: learner.step(table), unmapped=unmapped)
            stages.run(f"wake {step}", engine.wake)
            stages.run(f"update {step}", lambda: engine.load_adapter(learner.adapter()))
        stages.finish()


if __name__ == "__main__":
    main()
