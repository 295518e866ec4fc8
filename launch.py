"""Epiphany: `python launch.py [group=choice ...] [section.key=value ...]`.

`train` is the algorithm, and the only loop: sample, score, store, learn, update. epiphany/trainer.py holds what
surrounds it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

if TYPE_CHECKING:
    from conf.errors import UsageError
    from conf.schema import Settings
    from epiphany.stop import Stop
    from epiphany.trainer import Trainer

SWEPT: list[Path] = []  # the run folders of this process's sweep


def train(trainer: Trainer, stop: Stop) -> None:
    """Train until `run.steps` steps are done or a signal asks to stop."""
    settings = trainer.settings
    # Warm up: supervised steps on demonstrations, if warmup.steps asks for them.
    trainer.warm_up()
    while trainer.version < settings.run.steps and not stop:
        # Sample: start groups for the version in training, and for each version that may lag behind it.
        trainer.sample(trainer.free_slots())

        # Learn, as soon as a batch is stored and the step leaves no group too old that is still being sampled.
        if not trainer.is_learning and (batch := trainer.next_batch()) is not None:
            trainer.start_step(batch)

        # Until the step is done: sample on, score what is finished, and store what is scored.
        if not trainer.step_done():
            trainer.poll()
            continue

        # Update: the engines get the new adapter. Unfinished sequences stay in them and go on under it.
        trainer.complete_step()

        is_last = trainer.version == settings.run.steps
        if trainer.version % settings.run.checkpoint_every == 0 or is_last:
            trainer.save()
        if settings.evaluation.every and trainer.version % settings.evaluation.every == 0 and not is_last:
            trainer.evaluate()
    if trainer.is_learning:
        trainer.complete_step()
    if stop:
        trainer.save()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def _hydra_main(config: DictConfig) -> None:
    from conf.errors import UsageError
    from epiphany.commands import COMMANDS
    from epiphany.run_settings import settings_of_task

    try:
        settings = settings_of_task(config, list(HydraConfig.get().overrides.task))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _sweep_job(settings)
        else:
            sys.exit(COMMANDS[settings.task](settings, train))
    except UsageError as error:
        _fail(error)


def _sweep_job(settings: Settings) -> None:
    """One job of a sweep: a process of its own, with a run folder that is named by its overrides."""
    from conf.overrides import sweep_folder

    overrides = list(HydraConfig.get().overrides.task)
    folder = sweep_folder(settings.run.folder, overrides)
    command = [sys.executable, str(Path(__file__).resolve()), *overrides, f"run.folder={folder}"]
    SWEPT.append(Path(folder))
    code = _run_job(command)
    if code:
        sys.exit(code)


def _run_job(command: list[str]) -> int:
    """Run a job to its end; its exit code. Ctrl-C reaches it from the terminal, and SIGTERM is passed on, so that it
    saves; this process waits for it.
    """
    job = subprocess.Popen(command)
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: job.terminate()}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return job.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _fail(error: UsageError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> None:
    """The console script."""
    try:
        from epiphany import __version__
    except ImportError as error:  # a file of the user's is in the way
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.path.append(str(Path.cwd()))  # last, for recipes and rewards named module:name
    from conf.errors import UsageError
    from conf.overrides import check_overrides, normalize_overrides, wants_version
    from conf.schema import register

    if wants_version(sys.argv[1:]):
        print(f"epiphany {__version__}")
        return
    register()
    try:
        check_overrides(sys.argv[1:])
        sys.argv[1:] = normalize_overrides(sys.argv[1:])
    except UsageError as error:
        _fail(error)
    try:
        _hydra_main()
    except KeyboardInterrupt:  # before the run listens itself, and in tasks that are not runs
        sys.exit(128 + signal.SIGINT)
    finally:
        if SWEPT:
            from rich.console import Console

            from epiphany.report.sweep import show_sweep

            show_sweep(Console(), SWEPT)


if __name__ == "__main__":
    main()
