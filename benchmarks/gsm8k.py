"""GSM8K for real: `python -m benchmarks.gsm8k model.path=... [--seeds 0] [--steps 60] [override ...]`.

Trains `experiment=gsm8k` as a user would, with 128 answers a step, and judges 256 questions that are never trained on.
One JSON line a run: accuracy before and after with intervals, curves by step, seconds by part, memory by the driver,
the distance between engine and learner, and answers to the same questions before and after. Needs a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.common import report
from benchmarks.gpu_memory import MemorySampler, gib_in_use_by_others
from conf.compose import load_settings
from epiphany import commands
from epiphany.report import metrics
from epiphany.report.run_folder import Layout
from launch import train

QUESTIONS = 256
WORK = (
    "experiment=gsm8k",
    f"data.held_out={QUESTIONS}",
    f"evaluation.max_prompts={QUESTIONS}",
    "evaluation.every=0",
    "algorithm.prompts_per_step=16",
    "algorithm.group_size=8",
    "run.checkpoint_every=1000",
)

Rows = list[dict[str, Any]]


def greedy_answers(file: Path) -> dict[int, dict[str, Any]]:
    """The greedy answers of one evaluation, by question."""
    rows = pq.read_table(file).to_pylist()
    return {row["ordinal"]: row for row in rows if row["temperature"] == 0}


def side_by_side(layout: Layout, steps: int, count: int) -> list[dict[str, str]]:
    """Greedy answers before and after training to questions that only the latter gets right."""
    before, after = (greedy_answers(layout.evaluation_rows / f"step-{step:06d}.parquet") for step in (0, steps))
    improved = [o for o in after if o in before and after[o]["lenient"] == 1 and before[o]["lenient"] == 0]
    return [
        {
            "question": after[ordinal]["question"],
            "before": before[ordinal]["completion"],
            "after": after[ordinal]["completion"],
        }
        for ordinal in improved[:count]
    ]


def described(evaluation: dict[str, Any]) -> dict[str, Any]:
    names = ("lenient", "low", "high", "strict", "mean_tokens", "prompts")
    return {kind: {name: evaluation[kind][name] for name in names} for kind in ("greedy", "sampled")}


def curve(rows: Rows, name: str) -> list[float | None]:
    return [None if row[name] is None else round(row[name], 4) for row in rows]


def run(overrides: Sequence[str], *, seed: int, steps: int, answers: int) -> None:
    """Train once and print the line."""
    folder = Path(f"runs/gsm8k/{int(time.time())}-{seed}")
    settings = load_settings(
        *WORK, f"run.steps={steps}", f"run.seed={seed}", f"run.folder={folder}", "run.resume=never", *overrides
    )
    layout, others = Layout(folder), gib_in_use_by_others()
    sampler = MemorySampler(layout.metrics)
    exit_code = commands.train(settings, train)
    if exit_code:
        raise SystemExit(exit_code)
    used = [gib for _, gib in sampler.finish()]
    rows, evaluations = metrics.read(layout.metrics), metrics.read(layout.evaluations)
    seconds = [row["seconds"] for row in rows]
    report(
        benchmark="gsm8k",
        overrides=list(overrides),
        seed=seed,
        steps=len(rows),
        before=described(evaluations[0]),
        after=described(evaluations[-1]),
        step_seconds_median=statistics.median(seconds),
        rollout_seconds_median=statistics.median(row["rollout_seconds"] for row in rows),
        learner_seconds_median=statistics.median(row["learner_seconds"] for row in rows),
        first_step_after=sampler.first_row_after,
        peak_gib=max(used) - others,
        logprob_gap=statistics.mean(row["logprob_gap"] for row in rows if row["logprob_gap"] is not None),
        minutes=[round(total / 60, 2) for total in accumulate(seconds)],
        reward=curve(rows, "reward"),
        terms={
            name: [round(row["reward_terms"].get(name, 0.0), 4) for row in rows] for name in rows[0]["reward_terms"]
        },
        completion_tokens=curve(rows, "completion_tokens"),
        entropy=curve(rows, "entropy"),
        answers=side_by_side(layout, len(rows), answers),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--answers", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    for seed in arguments.seeds:
        run(overrides, seed=seed, steps=arguments.steps, answers=arguments.answers)


if __name__ == "__main__":
    main()
