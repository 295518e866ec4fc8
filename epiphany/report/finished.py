"""A run that has ended is not loaded again: its result is shown from its folder. Loads no torch."""

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from conf.errors import UsageError
from conf.schema import Settings
from epiphany.report import metrics
from epiphany.report.run_folder import Layout, read_settings
from epiphany.report.table import show_evaluations


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
        and (paths.adapter / "adapter_model.safetensors").is_file()
    )
    if is_finished:
        console.print(f"{paths.path} has run its {settings.run.steps} steps: nothing is left to do", highlight=False)
        show_evaluations(console, evaluations)
        console.print(f"the adapter is in {paths.adapter}, curves and completions beside it", highlight=False)
    return is_finished
