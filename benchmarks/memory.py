"""The memory plan beside what is used, stage by stage: `python -m benchmarks.memory [case] [override ...]`.

For a case of benchmarks/work.py: the plan, and a JSON line for each stage of two steps. `process` is what
the driver counts, `outside` what of it torch does not: context, libraries, graphs. Needs a GPU that nothing else uses.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from actors.types import Request, Sampling
from benchmarks.common import build_workers, report
from benchmarks.step import DriverMemory, used_before
from benchmarks.work import CASES, prompts_of, random_rollouts, work_settings

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="?", default="w", choices=list(CASES))
    arguments, overrides = parser.parse_known_args()
    before = used_before()
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings(arguments.case, Path(folder), *overrides)
        driver = DriverMemory(Path(folder) / "none")

        def stage(name: str, action: Callable[[], Any], lent: float = 0.0) -> Any:
            """Do it and report; `lent`: GiB that torch still counts as its own and the driver does not."""
            torch.cuda.reset_peak_memory_stats()
            since = len(driver.samples)
            result = action()
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            process, reserved = (total - free) / GIB - before, torch.cuda.memory_reserved() / GIB - lent
            report(
                benchmark="memory", case=arguments.case, overrides=overrides, stage=name, process_gib=process,
                process_gib_highest=max([gib for _, gib in driver.samples[since:]], default=0.0) - before,
                outside_gib=process - reserved, reserved_gib=reserved,
                reserved_gib_highest=torch.cuda.max_memory_reserved() / GIB - lent,
                allocated_gib=torch.cuda.memory_allocated() / GIB - lent,
                allocated_gib_highest=torch.cuda.max_memory_allocated() / GIB - lent,
            )  # fmt: skip
            return result

        stage("context", lambda: torch.zeros(1, device="cuda"))
        workers = stage("workers", lambda: build_workers(settings))
        blueprint, engine, learner = workers.blueprint, workers.engine, workers.learner
        print("\n".join(blueprint.notes), flush=True)
        table = random_rollouts(settings, blueprint.shape.vocabulary)

        def sample() -> None:
            prompts = prompts_of(table)
            engine.submit(
                [Request(f"{i}", p, Sampling(1.0, settings.sampling.max_tokens)) for i, p in enumerate(prompts)]
            )
            while engine.unfinished:
                engine.step()

        released = blueprint.settings.engine.release_cache
        lent = (blueprint.settings.engine.kv_cache_gib or 0.0) if released else 0.0
        for step in (1, 2):
            stage(f"rollout {step}", sample)
            engine.release_cache()
            stage(f"learner {step}", lambda: learner.step(table), lent)
            stage(f"cache back {step}", engine.restore_cache)
            stage(f"update {step}", lambda: engine.load_adapter(learner.adapter()))
        driver.finish()


if __name__ == "__main__":
    main()
