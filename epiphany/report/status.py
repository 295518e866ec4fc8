"""What a run folder says of its run, from outside: `python launch.py task=status run=<folder>`."""

import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from rich.console import Console

from conf.errors import disk_errors
from epiphany.report import metrics
from epiphany.report.activity import print_line
from epiphany.report.columns import columns, one_line
from epiphany.report.run_folder import Layout, RunFolderError, process_of, read_settings
from epiphany.report.table import warnings_of, workers_table


def show_status(console: Console, folder: Path) -> None:
    """Print which process runs it, how far it is, its last step and its workers then.

    Raises RunFolderError if `folder` holds no run, or a damaged one.
    """
    paths = Layout(folder)
    if not paths.settings.is_file():
        raise RunFolderError(f"run.folder={folder} holds no run")
    steps = _steps(paths)
    rows = metrics.read(paths.metrics)
    checkpoint = paths.checkpoints / "latest"
    with disk_errors(folder):
        saved = checkpoint.read_text(errors="replace").strip() if checkpoint.is_file() else "none"
    step = rows[-1]["step"] if rows else 0
    print_line(console, f"{folder}: step {step} of {steps}, {_process(paths.lock)}; checkpoint {saved}")
    if rows:
        age = time.time() - paths.metrics.stat().st_mtime
        print_line(console, f"the last step ended {age:.0f} s ago:")
        print_line(console, one_line(columns(rows[-1], steps, "")))
        for line in warnings_of(rows[-1]).values():
            print_line(console, line)
        console.print(workers_table(rows[-1].get("workers", {})))


def _steps(paths: Layout) -> int:
    run = read_settings(paths).settings.get("run")
    steps = run.get("steps") if isinstance(run, Mapping) else None
    if not isinstance(steps, int):
        raise RunFolderError(f"{paths.settings} is damaged: it does not say how many steps the run has")
    return steps


def _process(lock: Path) -> str:
    process = process_of(lock)
    return "not running" if process is None or not psutil.pid_exists(process) else f"running as process {process}"
