"""The order of training prompts: which source comes next, and which of its rows. Plain Python.

Everything follows from a seed and from the groups that were trained, so that a resumed run continues exactly.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class Mixture:
    """Which source each ordinal comes from, so that all shares are as close to `weights` as they can be at any time."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._shares = [weight / sum(weights) for weight in weights]
        self._counts = [0] * len(weights)
        self._places: list[tuple[int, int]] = []

    def at(self, ordinal: int) -> tuple[int, int]:
        """The source, and how many ordinals before this one came from it."""
        while len(self._places) <= ordinal:
            ahead = len(self._places) + 1
            behind = [share * ahead - count for share, count in zip(self._shares, self._counts, strict=True)]
            source = behind.index(max(behind))
            self._places.append((source, self._counts[source]))
            self._counts[source] += 1
        return self._places[ordinal]


@dataclass(frozen=True)
class _Epoch:
    """Epoch `number` begins at position `start`, without the rows `left_out`."""

    number: int
    start: int
    left_out: frozenset[int]


@dataclass
class Epochs:
    """The rows 0 to `size` - 1 in endless epochs, each in an order of its own that depends on `seed`.

    An epoch leaves out each row that was solved when the last step was done, with the probability 1 - `revisit_solved`;
    if none would be left, it has all.
    """

    size: int
    seed: int
    revisit_solved: float = 1.0
    _solved: set[int] = field(default_factory=set)
    _known: frozenset[int] = frozenset()  # those of the last step
    _epochs: list[_Epoch] = field(default_factory=lambda: [_Epoch(0, 0, frozenset())])
    _order: tuple[int, list[int]] = (-1, [])  # of the epoch that was used last

    def at(self, position: int) -> int:
        """The row at a position of the training order."""
        while position >= self._end(self._epochs[-1]):
            self._begin_epoch()
        epoch = next(epoch for epoch in reversed(self._epochs) if epoch.start <= position)
        return self._rows(epoch)[position - epoch.start]

    def record(self, row: int, *, solved: bool) -> None:
        """Remember whether the row's last group was solved."""
        if solved:
            self._solved.add(row)
        else:
            self._solved.discard(row)

    def end_step(self) -> None:
        """Let the next epochs know what was recorded until now."""
        if self.revisit_solved < 1:
            self._known = frozenset(self._solved)

    def checkpoint(self) -> dict[str, Any]:
        """What a checkpoint stores: as JSON, and empty if the order depends on the seed alone."""
        if self.revisit_solved == 1:
            return {}
        epochs = [[epoch.number, epoch.start, sorted(epoch.left_out)] for epoch in self._epochs]
        return {"epochs": epochs, "solved": sorted(self._solved), "known": sorted(self._known)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `checkpoint` returned."""
        if state:
            self._epochs = [_Epoch(number, start, frozenset(rows)) for number, start, rows in state["epochs"]]
            self._solved, self._known = set(state["solved"]), frozenset(state["known"])
            self._order = -1, []

    def _end(self, epoch: _Epoch) -> int:
        return epoch.start + self.size - len(epoch.left_out)

    def _begin_epoch(self) -> None:
        last = self._epochs[-1]
        number, left_out = last.number + 1, frozenset[int]()
        if self.revisit_solved < 1:
            draw = random.Random(f"revisit:{self.seed}:{number}")
            left_out = frozenset(row for row in sorted(self._known) if draw.random() >= self.revisit_solved)
        if len(left_out) == self.size:
            left_out = frozenset()
        self._epochs.append(_Epoch(number, self._end(last), left_out))

    def _rows(self, epoch: _Epoch) -> list[int]:
        if self._order[0] != epoch.number:
            rows = list(range(self.size))
            random.Random(f"order:{self.seed}:{epoch.number}").shuffle(rows)
            self._order = epoch.number, [row for row in rows if row not in epoch.left_out]
        return self._order[1]
