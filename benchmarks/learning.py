"""Learning runs on reasoning-gym tasks, several seeds on one engine, through the loop of launch.py.

python -m benchmarks.learning [override ...] [--seeds 0 1 2] [--runs name ...] prints one JSON line a run: accuracy
before and after, and the median step. The run folders stay, with all metrics.
"""

import argparse
import statistics
from typing import Any

from rich.console import Console

from benchmarks.common import build_workers, report, settings_from
from launch import Stop, train
from report import metrics
from session import Session

FRESH_DRAWS = [
    "data.held_out_source=reasoning_gym:chain_sum",
    "++data.held_out_task={seed: 1, size: 256}",
    "data.held_out=256",
]
# Each run's overrides: the sums, judged on fresh draws (of which there are only 200 distinct ones, so that training has
# seen most) and on questions never trained on; and two tasks that start between 5 % and 30 %.
RUNS = {
    "sums": FRESH_DRAWS,
    "sums-unseen": [],
    "products": [
        "data=file", "data.source=reasoning_gym:products", "data.held_out=32",
        "++data.task={size: 2000, min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    ],
    "gcd": ["data=file", "data.source=reasoning_gym:gcd", "data.held_out=128", "++data.task={size: 2000, max_value: 30}"],
}  # fmt: skip

SUMS = ("experiment=sums", "data.max_prompt_tokens=128")  # what every run begins with

Rows = list[dict[str, Any]]


def engine_for(*overrides: str) -> Any:
    """An engine that all runs of `learn` can share."""
    return build_workers(settings_from(*SUMS, *overrides)).engine


def learn(engine: Any, folder: str, *overrides: str) -> tuple[Rows, Rows]:
    """One run; its lines of metrics and of evaluations."""
    settings = settings_from(*SUMS, "run.resume=never", f"run.folder={folder}", *overrides)
    session = Session(settings, Console(), engine=engine)
    session.evaluate_once()
    train(session, Stop())
    session.finish()
    session.close()
    return metrics.read(session.folder.metrics), metrics.read(session.folder.evaluations)


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
            report(
                benchmark="learning", run=run, seed=seed, steps=len(rows),
                before={kind: evaluations[0][kind]["lenient"] for kind in ("greedy", "sampled")},
                after={kind: evaluations[-1][kind]["lenient"] for kind in ("greedy", "sampled")},
                interval=[evaluations[-1]["greedy"]["low"], evaluations[-1]["greedy"]["high"]],
                best_constant=evaluations[-1]["best_constant"]["share"], prompts=evaluations[-1]["greedy"]["prompts"],
                step_seconds_median=statistics.median(row["seconds"] for row in rows),
                step_seconds_mean=statistics.mean(row["seconds"] for row in rows),
                rollout_seconds=statistics.mean(row["rollout_seconds"] for row in rows),
                learner_seconds=statistics.mean(row["learner_seconds"] for row in rows),
            )  # fmt: skip


if __name__ == "__main__":
    main()
