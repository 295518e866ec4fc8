"""Time and memory of training steps on real shapes: `python -m benchmarks.step <case> [--steps 8] [override ...]`.

Runs launch.py's own loop on random weights and prints one JSON line: seconds a step, its parts, and the memory of the
process as the driver counts it. Cases: see benchmarks/work.py; `all` runs each in a process of its own. The first WARM
steps are not counted. Needs a GPU that nothing else uses.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import epiphany
from benchmarks.common import report
from benchmarks.gpu_memory import GIB, MemorySampler, gib_in_use_by_others
from benchmarks.work import CASES, work_settings
from epiphany.report.run_folder import Layout

WARM = 2
SHOWN = ("logprob_gap", "staleness", "trained")  # beside seconds and rates


def run(case: str, steps: int, overrides: list[str]) -> None:
    shape, _, more = CASES[case]
    before = gib_in_use_by_others()
    with tempfile.TemporaryDirectory() as scratch:
        settings = work_settings(case, Path(scratch), f"run.steps={steps}", *overrides)
        metrics = Layout(Path(settings.run.folder)).metrics
        sampler = MemorySampler(metrics)
        exit_code = epiphany.train(settings)
        samples = sampler.finish()
        lines = metrics.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    if len(rows) <= WARM:
        raise SystemExit(f"{case}: {len(rows)} steps (exit code {exit_code}), of which the first {WARM} do not count")
    steady, since, until = rows[WARM:], sum(map(len, lines[:WARM])), sum(map(len, lines))
    process_gib = [gib - before for written, gib in samples if since <= written < until]
    report(
        benchmark="step",
        case=case,
        shape=shape,
        overrides=[*more, *overrides],
        exit_code=exit_code,
        steps=len(rows),
        first_step_s=rows[0]["seconds"],
        seconds_mean=statistics.mean(row["seconds"] for row in steady),
        **medians(steady),
        card_before_gib=round(before, 2),
        process_gib_highest=round(max(gib for _, gib in samples) - before, 3),
        process_gib_median=round(statistics.median(process_gib), 3),
        highest_over_median=round(max(process_gib) / statistics.median(process_gib), 4),
        torch_allocated_highest_gib=round(torch.cuda.max_memory_allocated() / GIB, 3),
        torch_reserved_highest_gib=round(torch.cuda.max_memory_reserved() / GIB, 3),
    )


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each number of the rows that is a time, a rate or among SHOWN."""
    names = [name for name, value in rows[0].items() if type(value) in (int, float)]
    shown = [name for name in names if name.endswith("seconds") or "per_second" in name or name.startswith(SHOWN)]
    return {f"{name}_median": statistics.median(row[name] for row in rows) for name in shown}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=[*CASES, "all"])
    parser.add_argument("--steps", type=int, default=8)
    arguments, overrides = parser.parse_known_args()
    if arguments.case != "all":
        run(arguments.case, arguments.steps, overrides)
        return
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.step", case, "--steps", str(arguments.steps), *overrides]
        if subprocess.run(command, check=False).returncode:
            print(json.dumps({"benchmark": "step", "case": case, "failed": True}), flush=True)


if __name__ == "__main__":
    main()
