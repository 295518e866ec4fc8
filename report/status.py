"""What a run folder says of its run, from outside: `python launch.py task=status run=<folder>`."""

import json
import time
from pathlib import Path

import psutil
from rich.console import Console

from conf.errors import UsageError
from report import metrics
from report.run_folder import Layout
from report.table import columns, one_line, warnings_of, workers_table


def show_status(console: Console, folder: Path) -> None:
    """Print who runs it, how far it is, its last step and its workers then. Raises UsageError if no run is there."""
    paths = Layout(folder)
    if not paths.settings.is_file():
        raise UsageError(f"run.folder={folder} holds no run")
    steps = json.loads(paths.settings.read_text())["settings"]["run"]["steps"]
    rows = metrics.read(paths.metrics)
    checkpoint = paths.checkpoints / "latest"
    saved = checkpoint.read_text() if checkpoint.is_file() else "none"
    lines = [f"{folder}: step {rows[-1]['step'] if rows else 0} of {steps}, {_holder(paths.lock)}; checkpoint {saved}"]
    if rows:
        age = time.time() - paths.metrics.stat().st_mtime
        lines.append(f"the last step ended {age:.0f} s ago:")
        lines.append(one_line(columns(rows[-1], steps, "")))
        lines += warnings_of(rows[-1]).values()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if rows:
        console.print(workers_table(rows[-1]["workers"]))


def _holder(lock: Path) -> str:
    text = lock.read_text().strip() if lock.is_file() else ""
    if not text or not psutil.pid_exists(int(text)):
        return "not running"
    return f"running as process {text}"
