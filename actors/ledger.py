"""Ledger: which ordinals were handed out, and which were trained. Plain Python."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Every ordinal below `frontier` was trained or given up; above it, those in `finished` were.

    `open` maps each ordinal that was handed out and is neither to the version that was current then. No ordinal is
    handed out twice, except after a resume, which puts the open ones back.
    """

    frontier: int = 0
    finished: set[int] = field(default_factory=set)
    open: dict[int, int] = field(default_factory=dict)
    given_up: int = 0

    def next(self, count: int, *, version: int) -> list[int]:
        """Hand out the `count` lowest ordinals that were never handed out."""
        ordinals, candidate = [], self.frontier
        while len(ordinals) < count:
            if candidate not in self.finished and candidate not in self.open:
                ordinals.append(candidate)
            candidate += 1
        self.open |= dict.fromkeys(ordinals, version)
        return ordinals

    def finish(self, ordinals: Iterable[int], *, given_up: bool = False) -> None:
        """These were trained (or given up: unscorable). Raises ValueError for one that is not open."""
        for ordinal in ordinals:
            if ordinal not in self.open:
                raise ValueError(f"ordinal {ordinal} is finished twice or was never handed out")
            del self.open[ordinal]
            self.finished.add(ordinal)
            self.given_up += given_up
        while self.frontier in self.finished:
            self.finished.remove(self.frontier)
            self.frontier += 1

    def is_finished(self, ordinal: int) -> bool:
        return ordinal < self.frontier or ordinal in self.finished

    def oldest_version(self, besides: Iterable[int]) -> int | None:
        """The version that the oldest open ordinal outside `besides` was handed out at."""
        skipped = set(besides)
        return min((v for ordinal, v in self.open.items() if ordinal not in skipped), default=None)

    def state(self) -> dict:
        """What a checkpoint keeps. Open ordinals are kept to be seen; a resume hands them out again."""
        return {
            "frontier": self.frontier, "finished": sorted(self.finished), "open": sorted(self.open),
            "given_up": self.given_up,
        }  # fmt: skip

    @classmethod
    def restore(cls, state: dict) -> "Ledger":
        return cls(state["frontier"], set(state["finished"]), {}, state["given_up"])
