"""The commands of the command line: `task=` names one. Each takes the settings and returns an exit code."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from conf.errors import UsageError
from conf.schema import Settings
from epiphany.quiet import quiet_libraries, quiet_transformers
from epiphany.stop import Interrupted, Stop

if TYPE_CHECKING:
    from actors.engines.base import Engine
    from epiphany.preflight import Checked
    from epiphany.report.table import LiveTable
    from epiphany.trainer import Trainer

Loop = Callable[["Trainer", Stop], None]
Note = Callable[[str], None]
Result = TypeVar("Result")
NARROW = 120  # columns, where the width is not known


class RunLost(UsageError):
    """A worker died that nothing can replace: the learner, with what it learned since the last checkpoint."""

    exit_code = 3


def train(settings: Settings, loop: Loop, *, engine: "Engine | None" = None) -> int:
    """One run from its settings to its exit code: 0, or 128 and the signal that stopped it."""
    from actors.runtime.base import WorkerLost
    from epiphany import preflight
    from epiphany.identity import check_early
    from epiphany.report.finished import show_if_finished
    from epiphany.report.table import LiveTable

    console = _console()
    if show_if_finished(settings, console):
        return 0
    check_early(settings)
    quiet_libraries()
    table, stop = LiveTable(console, settings.run.steps), Stop()
    try:
        with ExitStack() as closing:
            closing.callback(stop.close)
            with table.activity("checking the data and the reward"):
                checked = preflight.check(settings, table.note, closing)
            with table.activity("loading libraries and the model, starting the workers"):
                trainer = _start(settings, checked, table, stop=stop, closing=closing, engine=engine)
            stop.arm()
            closing.enter_context(table)
            trainer.evaluate_once()
            loop(trainer, stop)
            if not stop:
                trainer.finish()
            return stop.exit_code
    except WorkerLost as lost:
        raise RunLost(f"{lost}; the same command resumes from the last checkpoint") from lost
    except Interrupted as interrupted:
        return interrupted.exit_code


def _start(
    settings: Settings,
    checked: "Checked",
    table: "LiveTable",
    *,
    stop: Stop,
    closing: ExitStack,
    engine: "Engine | None",
) -> "Trainer":
    quiet_transformers()
    with warnings.catch_warnings(action="ignore"):
        from epiphany.trainer import Trainer
    return Trainer(settings, checked, table, closing=closing, engine=engine, stop=lambda: bool(stop))


def difficulty(settings: Settings, loop: Loop) -> int:
    """Measure how often the model answers each prompt of the data right, and write that beside it."""
    quiet_libraries()
    quiet_transformers()
    with warnings.catch_warnings(action="ignore"):
        from epiphany.difficulty import measure
    code, _ = _sample_and_score(partial(measure, settings))
    return code


def evaluate(settings: Settings, loop: Loop) -> int:
    """Measure the model, and whether its adapter makes it better than its base."""
    quiet_libraries()
    quiet_transformers()
    with warnings.catch_warnings(action="ignore"):
        from epiphany.use.evaluate import evaluate as measure
    code, verdict = _sample_and_score(partial(measure, settings))
    if verdict is not None:
        verdict.show(_console())
    return code


def _sample_and_score(work: "Callable[..., Result]") -> "tuple[int, Result | None]":
    """Do `work` until it is done or a signal asks it to stop: the exit code, and what it returned."""
    from epiphany.report.activity import activity, print_line

    console, stop = _console(), Stop()
    try:
        with ExitStack() as closing:
            closing.callback(stop.close)
            stop.arm()
            closing.enter_context(activity(console, "sampling answers and scoring them"))
            result = work(note=partial(print_line, console), stop=lambda: bool(stop), closing=closing)
            return stop.exit_code, result
    except Interrupted as interrupted:
        return interrupted.exit_code, None


def generate(settings: Settings, loop: Loop) -> int:
    """Answer one question, or a file of them."""
    with using_a_model() as (note, closing):
        from epiphany.use.generate import generate as answer

        answer(settings, note, closing=closing)
    return 0


def chat(settings: Settings, loop: Loop) -> int:
    """Talk to the model."""
    with using_a_model() as (note, closing):
        from epiphany.use.chat import chat as talk

        talk(settings, note, closing=closing)
    return 0


def serve(settings: Settings, loop: Loop) -> int:
    """Answer requests of OpenAI's interface until it is stopped."""
    with using_a_model() as (note, _):
        from epiphany.use.serve import serve as answer

        answer(settings, note)
    return 0


def export(settings: Settings, loop: Loop) -> int:
    """Write the model for others, and prove that it is the same."""
    with using_a_model() as (note, _):
        from epiphany.export.task import export as write

        write(settings, note)
    return 0


def report(settings: Settings, loop: Loop) -> int:
    """Write the page of the run in run.folder."""
    with using_a_model() as (note, _):
        from epiphany.use.report import report as write

        write(settings, note)
    return 0


@contextmanager
def using_a_model() -> Iterator[tuple[Note, ExitStack]]:
    """Within, libraries are quiet, lines for the user go to the standard error, and what was opened is closed after."""
    from epiphany.report.activity import print_line

    quiet_libraries()
    quiet_transformers()
    with warnings.catch_warnings(action="ignore"), ExitStack() as closing:
        yield partial(print_line, Console(stderr=True)), closing


def status(settings: Settings, loop: Loop) -> int:
    """Show how the run in run.folder is doing."""
    from epiphany.report.status import show_status

    show_status(Console(), Path(settings.run.folder))
    return 0


def plan(settings: Settings, loop: Loop) -> int:
    """Show what would run, whether it fits and what it trains. Trains nothing and leaves no run folder."""
    from epiphany.report.activity import print_line
    from epiphany.show_plan import show_plan

    show_plan(settings, partial(print_line, _console()))
    return 0


def doctor(settings: Settings, loop: Loop) -> int:
    """Show what this machine has, what does not fit together, and what will be slow: 2 if something must be mended."""
    quiet_libraries()
    with warnings.catch_warnings(action="ignore"):
        from epiphany import doctor as of_machine

        findings = of_machine.examine(settings)
    of_machine.show(_console(), findings)
    return 2 if any(finding.state == of_machine.PROBLEM for finding in findings) else 0


COMMANDS: dict[str, Callable[[Settings, Loop], int]] = {
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "evaluate": evaluate,
    "export": export,
    "difficulty": difficulty,
    "report": report,
    "status": status,
    "plan": plan,
    "doctor": doctor,
}


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else NARROW)
