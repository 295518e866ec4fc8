"""What workers have done, in numbers, for the metrics of a step."""

from dataclasses import dataclass
from typing import TypedDict

from actors.rollout import RunProgress


class WorkerCounters(TypedDict, total=False):
    """What a worker has done: groups that are `in_flight` at it and its `restarts`.

    Rollout workers also have the adapter's `version`, and since the counters were last taken `tokens_per_second` in the
    `seconds` of sampling, and `preemptions`: how often a sequence had to wait for room in the cache.
    """

    in_flight: int
    restarts: int
    version: int | None
    tokens_per_second: float
    seconds: float
    preemptions: int


@dataclass
class Sampled:
    """What a rollout worker sampled."""

    tokens: int = 0
    seconds: float = 0.0
    preemptions: int = 0

    def add(self, progress: RunProgress) -> None:
        self.tokens += progress.tokens
        self.seconds += progress.seconds
        self.preemptions += progress.preemptions

    def counters(self) -> WorkerCounters:
        return {
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "preemptions": self.preemptions,
        }
