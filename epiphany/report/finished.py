"""What a run says at its end. One that has ended is not loaded again: its result is shown from its folder. Loads no
torch.
"""

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from actors.models.adapter import WEIGHTS
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.report import metrics
from epiphany.report.activity import print_line
from epiphany.report.run_folder import Layout, read_settings
from epiphany.report.table import show_evaluations


def adapter_line(paths: Layout) -> str:
    """Where the result is."""
    return f"the adapter is in {paths.adapter}, curves and completions beside it"


def show_if_finished(settings: Settings, console: Console) -> bool:
    """Show the result of the run in run.folder if these settings have run there to the end, and nothing is left to
    do.
    """
    paths = Layout(Path(settings.run.folder))
    try:
        stored = read_settings(paths).settings
        saved = (paths.checkpoints / "latest").read_text()
    except (UsageError, OSError, UnicodeDecodeError):
        return False
    evaluations = metrics.read(paths.evaluations)
    is_finished = (
        settings.run.resume == "auto"
        and stored == json.loads(json.dumps(dataclasses.asdict(settings)))
        and saved == f"step-{settings.run.steps:08d}"
        and bool(evaluations)
        and evaluations[-1]["step"] == settings.run.steps
        and (paths.adapter / WEIGHTS).is_file()
    )
    if is_finished:
        print_line(console, f"{paths.path} has run its {settings.run.steps} steps: nothing is left to do")
        show_evaluations(console, evaluations)
        print_line(console, adapter_line(paths))
    return is_finished
