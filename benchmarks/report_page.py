"""How long the report of a long run takes, and how large it is: `python -m benchmarks.report_page [--steps 300]`.

The run is made up: 300 steps of 16 groups of 8 answers of 300 tokens, with evaluations of 256 questions. One JSON line.
"""

import argparse
import json
import math
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.counters import WorkerCounters
from actors.replay.schema import to_batch
from actors.types import Group, Prompt, Score, Trajectory, Turn, VersionSpan
from benchmarks.common import report
from conf.compose import load_settings
from epiphany.report import evaluation, metrics
from epiphany.report.metrics import StepNumbers, step_row
from epiphany.report.run_folder import Layout, StoredSettings
from epiphany.report.started import write_started
from epiphany.use.report import report as write_report
from learner.metrics import StepStats

WORKERS: dict[str, WorkerCounters] = {
    "rollout-0": {"in_flight": 0, "restarts": 0, "version": 1, "tokens_per_second": 900.0, "seconds": 2.0}
}


def made_up_run(
    folder: Path,
    *,
    steps: int,
    groups: int = 16,
    answers: int = 8,
    tokens: int = 300,
    questions: int = 256,
    text: str = "The answer is 4.",
    overrides: tuple[str, ...] = (),
) -> Layout:
    """A run folder as a run of so many steps leaves it; `text` is the answer that the evaluations have."""
    layout, draw = Layout(folder), random.Random(0)
    layout.completions.mkdir(parents=True)
    settings = load_settings(f"run.folder={folder}", f"run.steps={steps}", *overrides)
    layout.settings.write_text(json.dumps(asdict(StoredSettings({}, asdict(settings), {}))))
    write_started(layout, ["engine vllm"], accelerator=None)
    with layout.metrics.open("w") as stream:
        for step in range(1, steps + 1):
            batch = [_group(step * groups + i, answers, tokens, draw, text=text) for i in range(groups)]
            table = pa.Table.from_batches([to_batch(group) for group in batch])
            stats = StepStats(
                version=step, entropy=math.exp(-step / 99), trained_tokens=1, seconds=1.0, loss=draw.random()
            )
            numbers = StepNumbers(WORKERS, 3.0 + draw.random(), groups * answers, 0, None, 0, 0)
            stream.write(json.dumps({**step_row(table, stats, numbers), "warnings": {}}) + "\n")
            logprobs_A = np.full(groups * answers * tokens, -0.9, dtype=np.float32)
            metrics.write_step_table(layout.completions, step, metrics.with_policy_logprobs(table, logprobs_A))
    for step in (0, steps // 2, steps):
        batch = [_group(i, 1, tokens, draw, text=f"{text} (step {step})") for i in range(questions)]
        record = evaluation.record(step, batch, [], seconds=9.0, reward="same")
        evaluation.save(layout, record, batch, temperature=1.0)
    return layout


def _group(ordinal: int, answers: int, tokens: int, draw: random.Random, *, text: str) -> Group:
    trajectory = Trajectory(
        tuple(draw.randrange(40, 250) for _ in range(tokens)),
        (Turn(True, tokens),),
        tuple(-draw.random() for _ in range(tokens)),
        text,
        "stop",
        (VersionSpan(0, tokens),),
    )
    rights = [float(draw.random() < 0.5) for _ in range(answers)]
    return Group(
        prompt=Prompt(ordinal, "p", (40, 41, 42), f"question {ordinal}", "4", "task"),
        trajectories=(trajectory,) * answers,
        worker="rollout-0",
        scores=tuple(Score(right, {"numeric": right}, strict=right, lenient=right) for right in rights),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = made_up_run(Path(scratch) / "run", steps=arguments.steps, overrides=tuple(overrides)).path
        start = time.monotonic()
        page = write_report(load_settings("task=report", f"run.folder={folder}"), lambda _line: None)
        seconds = time.monotonic() - start
        report(benchmark="report_page", steps=arguments.steps, seconds=seconds, mib=page.stat().st_size / 2**20)


if __name__ == "__main__":
    main()
