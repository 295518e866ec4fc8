"""Numbers of a step: its workers' counters, and the learner's statistics."""

from typing import Any

from epiphany.report import metrics
from learner.metrics import StepStats

WORKERS: dict[str, Any] = {
    "rollout-0": {"in_flight": 3, "restarts": 0, "version": 1, "tokens_per_second": 100.0, "seconds": 1.0},
    "reward-0": {"in_flight": 1, "restarts": 2},
}
NUMBERS = metrics.StepNumbers(
    WORKERS, seconds=1.0, samples=8, unscorable=0, unscorable_error=None, resampled=0, dropped=0
)


def trained(**changes: Any) -> StepStats:
    return StepStats(**{"version": 1, "trained_tokens": 5, "stream_tokens": 50, "seconds": 0.5, **changes})
