"""An adapter's way from the learner's process into the engine of another: `python -m benchmarks.adapter_hop [override ...]`.

Over Ray, on work W's shapes unless model.path says otherwise. Prints one JSON line: milliseconds (median and longest of 20)
from asking the learner for its adapter until an idle engine has it, and of the second half alone, from the object store.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.rollout import RolloutWorker
from actors.runtime import Promise, passed
from actors.types import Adapter
from benchmarks.common import report
from benchmarks.work import work_settings
from learner.worker import LearnerWorker
from session import Session

REPEATS = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = work_settings("w", Path(folder), "runtime=ray", *sys.argv[1:])
        session = Session(settings, Console(stderr=True))
        try:
            report(benchmark="adapter_hop", overrides=sys.argv[1:], **measure(session))
        finally:
            session.close()


def measure(session: Session) -> dict[str, Any]:
    learner, rollout = session.crew.first, session.pipeline.one("rollout")
    kept = learner.submit(LearnerWorker.adapter)

    def load(promise: Promise[Adapter]) -> None:
        rollout.submit(RolloutWorker.load_adapter, passed(promise)).result()

    return {
        "parameters": kept.result().layout.size,
        "hop_ms": milliseconds(lambda: load(learner.submit(LearnerWorker.adapter))),
        "second_half_ms": milliseconds(lambda: load(kept)),
    }


def milliseconds(action: Callable[[], Any]) -> dict[str, float]:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "longest": max(times)}


if __name__ == "__main__":
    main()
