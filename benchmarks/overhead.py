"""What Ray costs on the same work: `python -m benchmarks.overhead [--steps 5] [override ...]`, one JSON line.

The quickstart's model and task on the CPU, strictly on-policy and with one thread for each worker, first in one process
and then over Ray; the first step is not counted. Steps should take about ten seconds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import report
from epiphany.report import metrics
from epiphany.report.run_folder import Layout

WORK = [
    "experiment=quickstart",
    "hardware=cpu",
    "hardware.threads=1",
    "evaluation.samples=0",
    "evaluation.max_prompts=4",
    "run.checkpoint_every=1000",
    "algorithm.prompts_per_step=8",
    "algorithm.group_size=8",
    "sampling.max_tokens=32",
]


def step_seconds(folder: Path, overrides: list[str]) -> list[float]:
    """Of each step but the first."""
    command = [sys.executable, "launch.py", *WORK, f"run.folder={folder}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [row["seconds"] for row in metrics.read(Layout(folder).metrics)][1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        median = {
            name: statistics.median(
                step_seconds(Path(scratch) / name, [f"runtime={name}", f"run.steps={arguments.steps}", *overrides])
            )
            for name in ("local", "ray")
        }
    report(
        benchmark="overhead",
        steps=arguments.steps - 1,
        overrides=overrides,
        local_s=median["local"],
        ray_s=median["ray"],
        ratio=median["ray"] / median["local"],
    )


if __name__ == "__main__":
    main()
