"""Every algorithm beside GRPO, with the settings of its preset.

python -m benchmarks.algorithms cost [--case w] [override ...]: the learner's time and memory on the same random rows of
benchmarks/work.py, one JSON line each. python -m benchmarks.algorithms learn [override ...]: the runs of experiment=sums, 60
steps each on one engine: reward every tenth step, accuracy before and after, and seconds. `--only name ...` (last) takes some.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from actors.build import build_machine, build_model_source
from benchmarks.common import report, settings_from
from benchmarks.floor import seconds
from benchmarks.learning import FRESH_DRAWS, engine_for, learn
from benchmarks.work import random_rollouts, work_settings
from learner.build import build_learner, draw
from learner.learner import Learner
from learner.objectives import OBJECTIVES

EVERY = 10


def cost(names: list[str], case: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Planned for the one that takes most.
        settings = work_settings(case, Path(folder), "algorithm=ppo", "engine.share_weights=never", *overrides)
        blueprint = draw(settings, build_machine(settings), build_model_source(settings)[0])
    policy = build_learner(blueprint)[0].policy
    policy.lora.flat.detach()[policy.lora.layout.start_of_b :].normal_(0, 1e-4)
    table = random_rollouts(blueprint.settings, blueprint.shape.vocabulary)
    on_gpu = torch.cuda.is_available()
    grpo: dict[str, float] = {}
    for name in names:
        # The preset's own settings, on the batch of the case.
        a, preset = blueprint.settings.algorithm, settings_from(f"algorithm={name}").algorithm
        algorithm = replace(preset, prompts_per_step=a.prompts_per_step, group_size=a.group_size)
        objective = OBJECTIVES[name](algorithm, max_tokens=settings.sampling.max_tokens, term_weights={})
        learner = Learner(policy, objective, blueprint.settings.learner)
        stats = learner.step(table)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {"seconds": seconds(lambda learner=learner: learner.step(table))}
        if on_gpu:
            found["torch_allocated_highest_gib"] = torch.cuda.max_memory_allocated() / 2**30
        grpo = grpo or found
        report(
            benchmark="algorithms cost", algorithm=name, case=case, overrides=overrides, optimizer_steps=stats.optimizer_steps,
            trained_completions=stats.trained_completions, **found, of_grpo={key: found[key] / grpo[key] for key in found},
        )  # fmt: skip


def learn_each(names: list[str], overrides: list[str]) -> None:
    engine = engine_for(*overrides)
    for name in names:
        rows, evaluations = learn(
            engine, f"runs/algorithms/{name}", *FRESH_DRAWS, f"algorithm={name}", "algorithm.prompts_per_step=16",
            "algorithm.group_size=8", "run.steps=60", "evaluation.every=0", *overrides,
        )  # fmt: skip
        report(
            benchmark="algorithms learn", algorithm=name, overrides=overrides, steps=len(rows),
            reward={row["step"]: round(row["reward"], 3) for row in rows if row["step"] == 1 or row["step"] % EVERY == 0},
            before=evaluations[0]["greedy"]["lenient"], greedy=evaluations[-1]["greedy"]["lenient"],
            sampled=evaluations[-1]["sampled"]["lenient"], resampled=sum(row["resampled"] for row in rows),
            warnings=sorted({name for row in rows for name in row["warnings"]}),
            seconds_median=statistics.median(row["seconds"] for row in rows),
            learner_seconds_median=statistics.median(row["learner_seconds"] for row in rows),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["cost", "learn"])
    parser.add_argument("--case", default="w")
    parser.add_argument("--only", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    arguments, overrides = parser.parse_known_args()
    if arguments.what == "cost":
        cost(arguments.only, arguments.case, overrides)
    else:
        learn_each(arguments.only, overrides)


if __name__ == "__main__":
    main()
