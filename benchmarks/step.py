"""Time and memory of whole training steps on real shapes: `python -m benchmarks.step <case> [--steps 8] [override ...]`.

Runs launch.py's own loop on random weights and prints one JSON line: seconds a step, its parts, and the memory of the
process as the driver counts it. Cases: see CASES; `all` runs each in a process of its own. The first WARM steps are not
counted. Needs a GPU that nothing else uses.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.common import report, settings_from
from benchmarks.shapes import random_model

WARM = 2
WORK = [
    "algorithm.prompts_per_step=8",
    "algorithm.group_size=8",
    "sampling.max_tokens=512",
    "data.max_prompt_tokens=128",
]
ONE_PROMPT = [*WORK, "algorithm.prompts_per_step=1"]
# Each case: the shape, whether its checkpoint is in nf4 already, and overrides.
CASES: dict[str, tuple[str, bool, list[str]]] = {
    "w": ("qwen2.5-1.5b", False, WORK),
    "w-in-flight": ("qwen2.5-1.5b", False, [*WORK, "runtime.max_staleness=2"]),
    "qlora": ("qwen2.5-1.5b", False, [*ONE_PROMPT, "model.quantization=nf4", "hardware.vram_gib=5"]),
    "7gb-nf4": ("qwen2.5-1.5b", False, [*ONE_PROMPT, "hardware=7gb", "model.quantization=nf4", "sampling.max_tokens=1024"]),
    "7gb-bf16": ("qwen2.5-1.5b", False, [*ONE_PROMPT, "hardware=7gb", "sampling.max_tokens=1024"]),
    "15gb-llama-8b": ("llama-3.1-8b", True, [*ONE_PROMPT, "hardware.vram_gib=15"]),
    "15gb-qwen-7b": ("qwen2.5-7b", True, [*ONE_PROMPT, "hardware.vram_gib=15"]),
    "15gb-phi-4": ("phi-4", True, [*ONE_PROMPT, "model=phi-4", "hardware.vram_gib=15"]),
}  # fmt: skip


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
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def write_questions(folder: Path, count: int) -> Path:
    """Random questions of which each takes about 110 tokens with the byte tokenizer and the plain template."""
    draw = random.Random(0)
    file = folder / "questions.jsonl"
    rows = [{"question": "".join(draw.choices("abcdefgh ", k=90)), "answer": "1"} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(case: str, steps: int, overrides: list[str]) -> None:
    shape, is_nf4, more = CASES[case]
    before = used_before()
    from launch import run as launch

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = settings_from(
            "experiment=none", "data=file", f"data.source={write_questions(folder, 200)}", "data.held_out=1",
            *more, f"model.path={random_model(shape, nf4=is_nf4)}", "model.package=null", "evaluation.samples=0",
            "reward.terms=[{fn: 'benchmarks.coin:coin'}]", "reward.check_gold=false", f"run.folder={folder / 'run'}",
            f"run.steps={steps}", "run.checkpoint_every=1000", "learner.learning_rate=1.0e-9", *overrides,
        )  # fmt: skip
        metrics = folder / "run" / "metrics.jsonl"
        memory = DriverMemory(metrics)
        code = launch(settings)
        samples = memory.finish()
        lines = metrics.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
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
