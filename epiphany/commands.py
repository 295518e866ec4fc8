"""The commands of the command line: `task=` names one. Each takes the settings and returns an exit code."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from conf.errors import UsageError
from conf.schema import Settings
from epiphany.stop import Interrupted, Stop

if TYPE_CHECKING:
    from actors.engines.base import Engine
    from epiphany.trainer import Trainer

Loop = Callable[["Trainer", Stop], None]
NARROW = 120  # columns, where the width is not known


class RunLost(UsageError):
    """A worker died that nothing can replace: the learner, with what it learned since the last checkpoint."""

    exit_code = 3


def train(settings: Settings, loop: Loop, *, engine: "Engine | None" = None) -> int:
    """One run from its settings to its exit code: 0, or 128 and the signal that stopped it."""
    console = Console(width=None if sys.stdout.isatty() else NARROW)
    from epiphany.identity import check_early
    from epiphany.report.finished import show_if_finished

    if show_if_finished(settings, console):
        return 0
    check_early(settings)
    stop = Stop()
    trainer = None
    try:
        quiet_libraries()
        with warnings.catch_warnings(action="ignore"):
            from actors.runtime.base import WorkerLost
            from epiphany.trainer import Trainer
        try:
            trainer = Trainer(settings, console, engine=engine, stop=lambda: bool(stop))
            stop.arm()
            trainer.evaluate_once()
            loop(trainer, stop)
            if not stop:
                trainer.finish()
        except WorkerLost as lost:
            raise RunLost(f"{lost}; the same command resumes from the last checkpoint") from lost
    except Interrupted as interrupted:
        return interrupted.exit_code
    finally:
        if trainer is not None:
            trainer.close()
        stop.close()
    return stop.exit_code


def status(settings: Settings, loop: Loop) -> int:
    """Show how the run in run.folder is doing."""
    from epiphany.report.status import show_status

    show_status(Console(), Path(settings.run.folder))
    return 0


def plan(settings: Settings, loop: Loop) -> int:
    """Show what would run, whether it fits and what it trains. Starts nothing."""
    quiet_libraries()
    with warnings.catch_warnings(action="ignore"):
        from epiphany import preflight
        from epiphany.run_plan import plan_run
    console = Console(width=None if sys.stdout.isatty() else NARROW)

    def note(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    data = preflight.load_data(settings)
    preflight.describe_data(settings, data, note)
    run_plan = plan_run(settings, data.source)
    algorithm, way = settings.algorithm, run_plan.way
    for line in run_plan.lines():
        note(line)
    note(
        f"{settings.run.steps} steps of {algorithm.name}, each {algorithm.prompts_per_step} prompts x "
        f"{algorithm.group_size} completions of up to {settings.sampling.max_tokens} tokens, "
        f"{way.max_num_seqs} sequences at a time"
    )
    lora = settings.model.lora
    note(
        f"trains a LoRA adapter of rank {lora.rank} on {', '.join(lora.target_modules)}: "
        f"{run_plan.layout.size:,} numbers"
    )
    return 0


COMMANDS: dict[str, Callable[[Settings, Loop], int]] = {"train": train, "status": status, "plan": plan}


def quiet_libraries() -> None:
    """Silence what libraries say at their import and a user can do nothing about."""
    for name in ("bitsandbytes", "liger_kernel", "torch._library.triton"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"vllm|torch")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
