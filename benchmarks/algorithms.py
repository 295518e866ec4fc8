"""Every algorithm beside GRPO, with the settings of its preset.

`python -m benchmarks.algorithms cost [--case w] [override ...]`: the learner's time and memory on the same random rows
of benchmarks/work.py, one JSON line each. `python -m benchmarks.algorithms learn [override ...]`: the runs of
experiment=sums, 60 steps each on one engine: reward every tenth step, accuracy before and after, and seconds.
`--only name ...` (last) takes some.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import ON_GPU, build_learner, report, seconds
from benchmarks.learning import FRESH_DRAWS, engine_for, learn
from benchmarks.work import random_rollouts, work_settings
from conf.compose import load_settings
from epiphany.learner_factory import assemble_learner
from learner.algorithms.table import ALGORITHMS

EVERY = 10


def cost(names: list[str], case: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Planned for the algorithm that takes most memory.
        settings = work_settings(case, Path(folder), "algorithm=ppo", "engine.share_weights=never", *overrides)
        plan, planned = build_learner(settings)
    table = random_rollouts(settings, plan.shape.vocabulary)
    batch = {
        "prompts_per_step": settings.algorithm.prompts_per_step,
        "group_size": settings.algorithm.group_size,
    }
    grpo: dict[str, float] = {}
    for name in names:
        algorithm = replace(load_settings(f"algorithm={name}").algorithm, **batch)
        learner = assemble_learner(replace(settings, algorithm=algorithm), planned.policy, plan.way)
        stats = learner.step(table)
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        costs = {"seconds": seconds(lambda learner=learner: learner.step(table))}
        if ON_GPU:
            costs["torch_allocated_highest_gib"] = torch.cuda.max_memory_allocated() / 2**30
        grpo = grpo or costs
        report(
            benchmark="algorithms cost",
            algorithm=name,
            case=case,
            overrides=overrides,
            optimizer_steps=stats.optimizer_steps,
            trained_completions=stats.trained_completions,
            **costs,
            of_grpo={key: value / grpo[key] for key, value in costs.items()},
        )


def learn_each(names: list[str], overrides: list[str]) -> None:
    engine = engine_for(*overrides)
    batch = ("algorithm.prompts_per_step=16", "algorithm.group_size=8", "run.steps=60", "evaluation.every=0")
    for name in names:
        preset = f"algorithm={name}"
        rows, evaluations = learn(engine, f"runs/algorithms/{name}", *FRESH_DRAWS, preset, *batch, *overrides)
        shown = [row for row in rows if row["step"] == 1 or row["step"] % EVERY == 0]
        report(
            benchmark="algorithms learn",
            algorithm=name,
            overrides=overrides,
            steps=len(rows),
            reward={row["step"]: round(row["reward"], 3) for row in shown},
            before=evaluations[0]["greedy"]["lenient"],
            greedy=evaluations[-1]["greedy"]["lenient"],
            sampled=evaluations[-1]["sampled"]["lenient"],
            resampled=sum(row["resampled"] for row in rows),
            warnings=sorted({warning for row in rows for warning in row["warnings"]}),
            seconds_median=statistics.median(row["seconds"] for row in rows),
            learner_seconds_median=statistics.median(row["learner_seconds"] for row in rows),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["cost", "learn"])
    parser.add_argument("--case", default="w")
    parser.add_argument("--only", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    arguments, overrides = parser.parse_known_args()
    if arguments.what == "cost":
        cost(arguments.only, arguments.case, overrides)
    else:
        learn_each(arguments.only, overrides)


if __name__ == "__main__":
    main()
