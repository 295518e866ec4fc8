"""The Engine protocol: what a rollout engine must do. Knows no engine."""

import math
from collections.abc import Sequence
from typing import Protocol

from actors.types import Adapter, AdapterLayout, Completion, Request
from conf.errors import UsageError


class AdapterError(UsageError):
    """An adapter that does not fit the engine, or holds NaN or infinity."""


class Diverged(UsageError):
    """The adapter has learned itself to pieces: numbers are not finite any more."""


class Engine(Protocol):
    """Samples completions continuously.

    Requests may be submitted at any time. `load_adapter` may be called between any two steps: unfinished
    sequences stay and go on under the new adapter, which their `version_spans` record.
    """

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and have not been returned."""
        ...

    def submit(self, requests: Sequence[Request]) -> None: ...

    def step(self) -> list[Completion]:
        """Advance every running sequence by about one token; return what finished."""
        ...

    def load_adapter(self, adapter: Adapter) -> None:
        """Sample from `adapter` from now on. Raises AdapterError and keeps the old one if it does not fit."""
        ...

    def release_cache(self) -> None:
        """Give the key-value cache's memory back until `restore_cache`. Nothing may be unfinished, nor be submitted."""
        ...

    def restore_cache(self) -> None: ...

    def close(self) -> None:
        """End what the engine runs elsewhere; it cannot be used any more."""
        ...


def check_sampled(logprobs: Sequence[float], version: int) -> None:
    """Raises Diverged if a sampled token's log-probability is not finite."""
    if not all(map(math.isfinite, logprobs)):
        raise Diverged(
            f"adapter version {version} makes the model's probabilities NaN: the run has diverged. Go on from the last "
            "checkpoint with a lower learner.learning_rate"
        )


class SpanLog:
    """Counts, for each running request, the tokens that each adapter version sampled."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}

    def start(self, request_id: str) -> None:
        self._spans[request_id] = []

    def close(self, version: int, sampled: dict[str, int]) -> None:
        """Version `version` ends: `sampled` tells how many tokens each running request has so far."""
        for request_id, count in sampled.items():
            spans = self._spans[request_id]
            new = count - sum(n for _, n in spans)
            if new > 0:
                spans.append((version, new))

    def finish(self, request_id: str, version: int, count: int) -> list[tuple[int, int]]:
        """The (version, count) pairs of a finished request, which has `count` tokens."""
        self.close(version, {request_id: count})
        return self._spans.pop(request_id)


def check_adapter(adapter: Adapter, layout: AdapterLayout | None = None) -> None:
    """Refuse a flat buffer of the wrong size, with values that are not finite, or for another layout than `layout`."""
    if layout is not None and adapter.layout != layout:
        raise AdapterError("the adapter was made for other modules, another rank or another alpha")
    if tuple(adapter.flat.shape) != (adapter.layout.size,):
        raise AdapterError(
            f"adapter buffer has shape {tuple(adapter.flat.shape)}, its layout says ({adapter.layout.size},)"
        )
    if not bool(adapter.flat.isfinite().all()):
        raise AdapterError(f"adapter version {adapter.version} holds NaN or infinity; lower learner.learning_rate")
