"""Ledger: which prompts were handed out, and which were trained. Plain Python."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict


class LedgerState(TypedDict):
    """What a checkpoint stores of a ledger."""

    low_watermark: int
    finished: list[int]
    in_flight: list[int]
    dropped: int


@dataclass
class Ledger:
    """Every ordinal below `low_watermark` was trained or dropped; above it, those in `finished` were.

    `in_flight` maps each ordinal that was handed out and is neither to the version that was current then; of those, the
    replay holds `stored`. No ordinal is handed out twice, except after a resume, which hands out again those that were
    in flight. `dropped` counts the prompts that could not be scored or were refused.
    """

    low_watermark: int = 0
    finished: set[int] = field(default_factory=set)
    in_flight: dict[int, int] = field(default_factory=dict)
    dropped: int = 0
    stored: set[int] = field(default_factory=set)

    def next(self, count: int, *, version: int) -> list[int]:
        """Hand out the `count` lowest ordinals that were never handed out."""
        ordinals, candidate = [], self.low_watermark
        while len(ordinals) < count:
            if candidate not in self.finished and candidate not in self.in_flight:
                ordinals.append(candidate)
            candidate += 1
        self.in_flight |= dict.fromkeys(ordinals, version)
        return ordinals

    def finish(self, ordinals: Iterable[int], *, dropped: bool = False) -> None:
        """These were trained (or dropped). Raises ValueError for one that is not in flight."""
        for ordinal in ordinals:
            if ordinal not in self.in_flight:
                raise ValueError(f"ordinal {ordinal} is finished twice or was never handed out")
            del self.in_flight[ordinal]
            self.stored.discard(ordinal)
            self.finished.add(ordinal)
            self.dropped += dropped
        while self.low_watermark in self.finished:
            self.finished.remove(self.low_watermark)
            self.low_watermark += 1

    def restore_stored(self, ordinals: Iterable[int], *, version: int) -> None:
        """After a resume, the replay holds these."""
        self.stored = set(ordinals)
        self.in_flight |= dict.fromkeys(self.stored, version)

    def is_finished(self, ordinal: int) -> bool:
        return ordinal < self.low_watermark or ordinal in self.finished

    def oldest_version(self, besides: Iterable[int]) -> int | None:
        """The version at which the oldest ordinal in flight outside `besides` was handed out."""
        skipped = set(besides)
        return min((v for ordinal, v in self.in_flight.items() if ordinal not in skipped), default=None)

    def state(self) -> LedgerState:
        """What a checkpoint stores. Ordinals in flight are stored to be seen; a resume hands them out again."""
        return {
            "low_watermark": self.low_watermark,
            "finished": sorted(self.finished),
            "in_flight": sorted(self.in_flight),
            "dropped": self.dropped,
        }

    @classmethod
    def restore(cls, state: LedgerState) -> "Ledger":
        return cls(state["low_watermark"], set(state["finished"]), {}, state["dropped"])
