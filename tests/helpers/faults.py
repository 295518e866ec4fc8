"""A learner that dies, or hangs, where a file in the run folder with the name of a place says so."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from epiphany import assembly
from learner import checkpoint
from learner.parallel.worker import LearnerWorker

REAL_MAKE_LEARNER = assembly.make_learner

# Not one of PLACES, at which a run is getting on: "in the start", while it is built.
PLACES = ("before the optimizer", "after the optimizer", "in a checkpoint", "hang")


def install() -> None:
    """Have the next run of this process make such learners."""
    assembly.make_learner = make_learner


def make_learner(settings: Any, checkpoints: Path, *more: Any, **named: Any) -> LearnerWorker:
    end(checkpoints.parent, "in the start")
    worker = REAL_MAKE_LEARNER(settings, checkpoints, *more, **named)
    folder, optimizer = checkpoints.parent, worker.learner.optimizer
    step, sync = optimizer.step, checkpoint.sync

    def steps(*args: Any, **kwargs: Any) -> Any:
        end(folder, "before the optimizer")
        end(folder, "hang")
        result = step(*args, **kwargs)
        end(folder, "after the optimizer")
        return result

    def syncs(path: Path) -> None:
        sync(path)
        if path.name == "optimizer.safetensors":
            end(folder, "in a checkpoint")

    optimizer.step = steps
    checkpoint.sync = syncs
    return worker


def end(folder: Path, place: str) -> None:
    file = folder / place
    if file.exists():
        file.unlink()
        if place == "hang":
            time.sleep(1e6)
        os.kill(os.getpid(), signal.SIGKILL)
