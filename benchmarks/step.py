"""Time and memory of whole training steps on real shapes: `python -m benchmarks.step <case> [--steps 8] [override ...]`.

Runs launch.py's own loop on random weights and prints one JSON line: seconds a step, its parts, and the memory of the
process as the driver counts it. Cases: see benchmarks/work.py; `all` runs each in a process of its own. The first WARM steps are not
counted. Needs a GPU that nothing else uses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.work import CASES, work_settings

WARM = 2


class DriverMemory(threading.Thread):
    """Samples the memory in use on the card (GiB) every 20 ms, beside the size of the run's metrics.jsonl by then."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, float]] = []
        self._metrics = metrics
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        import torch

        while not self._ended.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            written = self._metrics.stat().st_size if self._metrics.exists() else 0
            self.samples.append((written, (total - free) / 2**30))

    def finish(self) -> list[tuple[int, float]]:
        self._ended.set()
        self.join()
        return self.samples


def used_before() -> float:
    """GiB in use on the card before this process touches it."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={card}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def run(case: str, steps: int, overrides: list[str]) -> None:
    shape, _, more = CASES[case]
    before = used_before()
    from launch import run as launch

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = work_settings(case, folder, f"run.steps={steps}", *overrides)
        metrics = folder / "run" / "metrics.jsonl"
        memory = DriverMemory(metrics)
        code = launch(settings)
        samples = memory.finish()
        lines = metrics.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    if len(rows) <= WARM:
        raise SystemExit(f"{case}: {len(rows)} steps (exit code {code}), of which the first {WARM} do not count")
    steady, since, until = rows[WARM:], sum(map(len, lines[:WARM])), sum(map(len, lines))
    held = [gib - before for written, gib in samples if since <= written < until]
    import torch

    report(
        benchmark="step", case=case, shape=shape, overrides=[*more, *overrides], exit_code=code, steps=len(rows),
        first_step_s=rows[0]["seconds"], seconds_mean=statistics.mean(row["seconds"] for row in steady),
        **_medians(steady), card_before_gib=round(before, 2),
        process_gib_highest=round(max(gib for _, gib in samples) - before, 3),
        process_gib_median=round(statistics.median(held), 3), highest_over_median=round(max(held) / statistics.median(held), 4),
        torch_allocated_highest_gib=round(torch.cuda.max_memory_allocated() / 2**30, 3),
        torch_reserved_highest_gib=round(torch.cuda.max_memory_reserved() / 2**30, 3),
    )  # fmt: skip


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = [n for n, v in rows[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    wanted = [
        n for n in names if n.endswith("seconds") or "per_second" in n or n.startswith(("mismatch", "lag", "trained"))
    ]
    return {f"{n}_median": statistics.median(row[n] for row in rows) for n in wanted}


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
