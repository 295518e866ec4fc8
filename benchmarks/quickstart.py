"""Candidates for the quickstart's settings, compared: `python -m benchmarks.quickstart [candidate ...] [override ...]`.

The held-out questions of the quickstart are left out altogether, so that they choose nothing: each seed holds out
others of the rest. `--seeds 0 1 2`, last, chooses the seeds. One JSON line for each run: accuracy on the held-out
questions every EVERY steps, beside the seconds of the steps until then and the tokens that were trained in them.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from benchmarks.common import build_workers, report
from benchmarks.learning import Rows
from conf.compose import load_settings
from conf.schema import Settings
from epiphany import commands
from epiphany.report import metrics
from epiphany.report.run_folder import Layout
from epiphany.rows import read_rows
from epiphany.run_data import load_data
from launch import train

EVERY = 8  # steps
# Version 0.1's quickstart until 2026-11-28, which every candidate changes in something.
BASE = ("experiment=quickstart", "data.system_prompt=null", "learner.schedule=constant")
BRIEF = "data.system_prompt=Answer with the number only."
NEGATIVE = "data.system_prompt=Answer with the number only. It may be negative."
SIGNED = "data.system_prompt='Answer with a number, such as 12 or -3.'"
FILTER = "algorithm.zero_variance_groups=filter"
LINEAR = "learner.schedule=linear"
DAPO = ("algorithm=dapo", "algorithm.overlong_buffer=0")
CANDIDATES = {
    "as-before": (),
    "lr-2e-4": ("learner.learning_rate=2e-4",),
    "lr-1e-3": ("learner.learning_rate=1e-3",),
    "4x16": ("algorithm.prompts_per_step=4", "algorithm.group_size=16"),
    "16x4": ("algorithm.prompts_per_step=16", "algorithm.group_size=4"),
    "warm": ("sampling.temperature=1.2",),
    "entropy-0.01": ("algorithm.entropy_coefficient=0.01",),
    "kl-0.02": ("algorithm.kl_coefficient=0.02",),
    "dr-grpo": ("algorithm=dr_grpo",),
    "dapo": DAPO,
    "filter": (FILTER,),
    "token-mean": ("algorithm.loss_aggregation=token_mean",),
    "brief": (BRIEF,),
    "brief-filter": (BRIEF, FILTER),
    "brief-lr-2e-4": (BRIEF, "learner.learning_rate=2e-4"),
    "brief-lr-1e-3": (BRIEF, "learner.learning_rate=1e-3"),
    "brief-8-tokens": (BRIEF, "sampling.max_tokens=8"),
    "brief-16x8": (BRIEF, "algorithm.prompts_per_step=16"),
    "brief-8x16": (BRIEF, "algorithm.group_size=16"),
    "brief-warm": (BRIEF, "sampling.temperature=1.2"),
    "brief-dr-grpo": (BRIEF, "algorithm=dr_grpo"),
    "brief-dapo": (BRIEF, *DAPO),
    "dapo-linear": (*DAPO, LINEAR, "run.steps=16"),
    "filter-linear": (FILTER, LINEAR, "run.steps=32"),
    "brief-linear": (BRIEF, LINEAR, "run.steps=32"),
    "brief-filter-linear": (BRIEF, FILTER, LINEAR, "run.steps=32"),
    "brief-dapo-linear": (BRIEF, *DAPO, LINEAR, "run.steps=16"),
    "warm-linear": ("sampling.temperature=1.2", LINEAR),
    "negative-linear": (NEGATIVE, LINEAR),
    "signed": (SIGNED,),
    "signed-linear": (SIGNED, LINEAR),
    "signed-filter-linear": (SIGNED, FILTER, LINEAR),
    "signed-dr-grpo": (SIGNED, "algorithm=dr_grpo"),
    "signed-lr-1e-3-linear": (SIGNED, LINEAR, "learner.learning_rate=1e-3"),
    "signed-warm-linear": (SIGNED, LINEAR, "sampling.temperature=1.2"),
    "signed-8x16-linear": (SIGNED, LINEAR, "algorithm.group_size=16"),
    "signed-16x8-linear": (SIGNED, LINEAR, "algorithm.prompts_per_step=16"),
    "signed-linear-32": (SIGNED, LINEAR, "run.steps=32"),
    "signed-linear-40": (SIGNED, LINEAR, "run.steps=40"),
    "signed-16x8-linear-20": (SIGNED, LINEAR, "algorithm.prompts_per_step=16", "run.steps=20"),
    "signed-12x8-linear": (SIGNED, LINEAR, "algorithm.prompts_per_step=12"),
    "signed-12x8-linear-18": (SIGNED, LINEAR, "algorithm.prompts_per_step=12", "run.steps=18"),
    "signed-12x8-linear-20": (SIGNED, LINEAR, "algorithm.prompts_per_step=12", "run.steps=20"),
    "signed-16x8-linear-14": (SIGNED, LINEAR, "algorithm.prompts_per_step=16", "run.steps=14"),
    "signed-12x8-linear-28": (SIGNED, LINEAR, "algorithm.prompts_per_step=12", "run.steps=28"),
    "signed-filter-linear-40": (SIGNED, FILTER, LINEAR, "run.steps=40"),
    "signed-filter-16x8-linear-20": (SIGNED, FILTER, LINEAR, "algorithm.prompts_per_step=16", "run.steps=20"),
}


def write_other_questions(settings: Settings, file: Path) -> None:
    """Write the prompts of the quickstart without its held-out questions as JSONL to `file`."""
    prompts = load_data(settings, read_rows(settings)).prompts
    rows = {(p.question, p.answer) for p in map(prompts.at, range(prompts.size))}
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in sorted(rows)))


def curve(rows: Rows, evaluations: Rows) -> list[dict[str, float]]:
    """Greedy and sampled accuracy at each evaluation, and the seconds and trained tokens of the steps until then."""
    seconds = [0.0, *itertools.accumulate(row["seconds"] for row in rows)]
    trained = [0, *itertools.accumulate(row["stream_tokens"] for row in rows)]
    return [
        {
            "step": e["step"],
            "greedy": e["greedy"]["lenient"],
            "sampled": e["sampled"]["lenient"],
            "seconds": round(seconds[e["step"]], 1),
            "stream_tokens": trained[e["step"]],
        }
        for e in evaluations
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments, rest = parser.parse_known_args()
    overrides = [*rest, *(name for name in arguments.names if name not in CANDIDATES)]
    names = [name for name in arguments.names if name in CANDIDATES] or list(CANDIDATES)
    base = (*BASE, *overrides)
    engine = build_workers(load_settings(*base, "engine.max_num_seqs=128")).engine
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        write_other_questions(load_settings(*base), questions)
        data = ("data=file", f"data.source={questions}", "data.max_prompt_tokens=128", "data.held_out=40")
        for seed, name in itertools.product(arguments.seeds, names):
            run = Path(folder) / f"{name}-{seed}"
            run_settings = (f"evaluation.every={EVERY}", f"run.seed={seed}", f"data.seed={seed}", f"run.folder={run}")
            chosen = load_settings(*base, *data, *CANDIDATES[name], *run_settings)
            if commands.train(chosen, train, engine=engine):
                raise SystemExit(f"{name} with seed {seed} failed")
            layout = Layout(run)
            rows = metrics.read(layout.metrics)
            report(
                benchmark="quickstart",
                candidate=name,
                overrides=[*overrides, *CANDIDATES[name]],
                seed=seed,
                curve=curve(rows, metrics.read(layout.evaluations)),
                entropy=[row["entropy"] and round(row["entropy"], 3) for row in rows[EVERY - 1 :: EVERY]],
            )


if __name__ == "__main__":
    main()
