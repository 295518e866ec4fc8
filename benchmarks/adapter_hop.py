"""From the learner's process into the engine of another: `python -m benchmarks.adapter_hop [override ...]`.

Over Ray, with the shapes of work W unless model.path says otherwise. Prints one JSON line: milliseconds (median and
longest of 20) from asking the learner for its adapter until an idle engine has it, and of the second half alone, from
the object store.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from actors.rollout import RolloutWorker
from actors.runtime.base import Future, as_argument
from actors.types import Adapter
from benchmarks.common import report
from benchmarks.work import work_settings
from epiphany.assembly import StartedRun, start_run
from epiphany.preflight import check
from learner.parallel.worker import LearnerWorker

REPEATS = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        settings = work_settings("w", Path(folder), "runtime=ray", *sys.argv[1:])
        checked = check(settings, to_stderr, closing)
        run = start_run(settings, checked, note=to_stderr, closing=closing)
        report(benchmark="adapter_hop", overrides=sys.argv[1:], **measure(run))


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def measure(run: StartedRun) -> dict[str, object]:
    learner, rollout = run.learners.first, run.supervisor.slot("rollout")
    stored = learner.submit(LearnerWorker.adapter)

    def load(adapter: Future[Adapter]) -> None:
        rollout.submit(RolloutWorker.load_adapter, as_argument(adapter)).result()

    return {
        "parameters": stored.result().layout.size,
        "hop_ms": milliseconds(lambda: load(learner.submit(LearnerWorker.adapter))),
        "second_half_ms": milliseconds(lambda: load(stored)),
    }


def milliseconds(action: Callable[[], None]) -> dict[str, float]:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "longest": max(times)}


if __name__ == "__main__":
    main()
