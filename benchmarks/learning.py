"""Learning runs on reasoning-gym tasks, several seeds on one engine, through the loop of launch.py.

`python -m benchmarks.learning [override ...] [--seeds 0 1 2] [--runs name ...]` prints one JSON line a run: accuracy
before and after, the median step, and the reward of each step. The run folders stay, with all metrics.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from actors.engines.base import Engine
from benchmarks.common import build_workers, report
from conf.compose import load_settings
from epiphany import commands
from epiphany.report import metrics
from epiphany.report.run_folder import Layout
from launch import train

FRESH_DRAWS = [
    "data.held_out_source=reasoning_gym:chain_sum",
    "data.held_out_task={seed: 1, size: 256}",
    "data.held_out=256",
]
# Each run's overrides: the sums, judged on fresh draws (of which there are only 200 distinct ones, so that training has
# seen most) and on questions never trained on; and two tasks that start between 5 % and 30 %.
RUNS = {
    "sums": FRESH_DRAWS,
    "sums-unseen": [],
    "products": [
        "data.source=reasoning_gym:products",
        "data.held_out=32",
        "data.task={size: 2000, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    ],
    "gcd": ["data.source=reasoning_gym:gcd", "data.held_out=128", "data.task={size: 2000, max_value: 30}"],
}
SUMS = ("experiment=sums", "data.max_prompt_tokens=128")  # what every run begins with

Rows = list[dict[str, Any]]


def engine_for(*overrides: str) -> Engine:
    """An engine that all runs of `learn` can share."""
    return build_workers(load_settings(*SUMS, *overrides)).engine


def learn(engine: Engine, folder: str, *overrides: str) -> tuple[Rows, Rows]:
    """Train one run; returns its lines of metrics and of evaluations."""
    settings = load_settings(*SUMS, "run.resume=never", f"run.folder={folder}", *overrides)
    exit_code = commands.train(settings, train, engine=engine)
    if exit_code:
        raise SystemExit(exit_code)
    layout = Layout(Path(folder))
    return metrics.read(layout.metrics), metrics.read(layout.evaluations)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    arguments, overrides = parser.parse_known_args()
    engine = engine_for(*overrides)
    for run in arguments.runs:
        for seed in arguments.seeds if run.startswith("sums") else arguments.seeds[:1]:
            folder = f"runs/learning/{run}-{seed}"
            rows, evaluations = learn(engine, folder, *RUNS[run], f"run.seed={seed}", *overrides)
            first, last = evaluations[0], evaluations[-1]
            report(
                benchmark="learning",
                run=run,
                seed=seed,
                steps=len(rows),
                before={kind: first[kind]["lenient"] for kind in ("greedy", "sampled")},
                after={kind: last[kind]["lenient"] for kind in ("greedy", "sampled")},
                interval=[last["greedy"]["low"], last["greedy"]["high"]],
                best_constant=last["best_constant"]["share"],
                prompts=last["greedy"]["prompts"],
                step_seconds_median=statistics.median(row["seconds"] for row in rows),
                step_seconds_mean=statistics.mean(row["seconds"] for row in rows),
                rollout_seconds=statistics.mean(row["rollout_seconds"] for row in rows),
                learner_seconds=statistics.mean(row["learner_seconds"] for row in rows),
                rewards=[round(row["reward"], 4) for row in rows],
                entropy=[None if row["entropy"] is None else round(row["entropy"], 4) for row in rows],
            )


if __name__ == "__main__":
    main()
