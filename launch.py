"""Epiphany: `python launch.py [group=choice ...] [section.key=value ...]`.

`train` is the algorithm, and the only loop: hand out prompts, sample, score, queue, learn, pass the new adapter on.
session.py holds what surrounds it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from conf.check import check_overrides, check_settings, spell_out
from conf.errors import UsageError
from conf.schema import Settings, register

if TYPE_CHECKING:
    from session import Session


def train(session: Session, stop: Stop) -> None:
    """Train until `run.steps` optimizer steps are done or a signal asks to stop."""
    s, ledger = session.settings, session.ledger
    batch_size, max_staleness = s.algorithm.prompts_per_step, s.runtime.max_staleness
    batch: list[int] = []
    learning = False  # from batch
    while session.version < s.run.steps and not stop.requested:
        # Hand out prompts: a batch for the version that is being trained, and one for each that may lag behind.
        free = batch_size * (1 + max_staleness) - len(ledger.open)
        session.dispatch(ledger.next(session.room(free), version=session.version))

        # Learn once a batch is there, unless it would leave a group too old that is still being sampled. With
        # max_staleness 0 that is any group at all: the engines are drained before each update.
        if not learning:
            batch = session.ready(batch_size)
            waiting_for = ledger.oldest_version(besides=batch)
            too_old = waiting_for is not None and session.version + 1 - waiting_for > max_staleness
            if len(batch) == batch_size and not too_old:
                session.learn(batch)
                learning = True

        # Until then, and while the learner works elsewhere: sample, score and queue.
        if not (learning and session.has_learned):
            session.work()
            continue

        # Pass the new adapter on. Unfinished sequences stay in the engines and go on under it.
        session.finish_step()
        learning = False

        if session.version % s.run.checkpoint_every == 0 or session.version == s.run.steps:
            session.save()
        if s.evaluation.every and session.version % s.evaluation.every == 0 and session.version < s.run.steps:
            session.evaluate()
    if learning:
        session.finish_step()
    if stop.requested:
        session.save()


class Stop:
    """The first SIGINT or SIGTERM asks the loop to stop after what it is doing; the second ends the process."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self.listen()

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number
        print(f"\n{signal.Signals(number).name}: saving; once more ends at once", file=sys.stderr)


def run(settings: Settings) -> int:
    """One run from its settings to its exit code: 0, or 128 + the signal that stopped it."""
    # What libraries say while they are imported, and a user can do nothing about.
    for name in ("bitsandbytes", "torch._library.triton"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with warnings.catch_warnings(action="ignore"):
        from actors.runtime import WorkerLost
        from session import RunLost, Session
    warnings.filterwarnings("ignore", module=r"vllm|torch")
    stop = Stop()
    session: Session | None = None
    try:
        console = Console(width=None if sys.stdout.isatty() else 120)
        session = Session(settings, console, stop=lambda: stop.requested is not None)
        stop.listen()  # an engine may have set handlers of its own
        if not stop.requested:
            session.evaluate_once()
            train(session, stop)
        if not stop.requested:
            session.finish()
        return 0 if stop.requested is None else 128 + stop.requested
    except WorkerLost as lost:
        raise RunLost(f"{lost}; the same command goes on from the last checkpoint") from lost
    finally:
        if session is not None:
            session.close()


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def _hydra_main(config: DictConfig) -> None:
    settings: Any = OmegaConf.to_object(config)
    try:
        check_settings(settings)
        if settings.task == "status":
            from report.status import show_status

            show_status(Console(), Path(settings.run.folder))
        elif HydraConfig.get().mode == RunMode.MULTIRUN:
            _sweep_job(settings)
        else:
            sys.exit(run(settings))
    except UsageError as error:
        _fail(error)


def _sweep_job(settings: Settings) -> None:
    """One job of a sweep: a process and a run folder of its own."""
    job = HydraConfig.get()
    folder = f"run.folder={settings.run.folder}-{job.job.num}"
    command = [sys.executable, str(Path(__file__).resolve()), *job.overrides.task, folder]
    subprocess.run(command, check=True)


def _fail(error: UsageError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def main() -> None:
    """The console script."""
    register()
    sys.argv[1:] = spell_out(sys.argv[1:])
    try:
        check_overrides(sys.argv[1:])
    except UsageError as error:
        _fail(error)
    _hydra_main()


if __name__ == "__main__":
    main()
