"""The time of every step of an engine while it samples."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from actors.types import Request

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class SteppingEngine(Protocol[T_co]):
    """What an Engine has for sampling; `step` returns what finished."""

    @property
    def unfinished(self) -> int: ...
    def submit(self, requests: list[Request], /) -> None: ...
    def step(self) -> Sequence[T_co]: ...


@dataclass(frozen=True)
class EngineSteps(Generic[T]):
    """For each step, its `seconds` and the sequences that were `running` before it; and what has finished."""

    seconds: list[float]
    running: list[int]
    finished: list[T]
    wall_seconds: float


def timed_steps(engine: SteppingEngine[T], requests: Sequence[Request] = ()) -> EngineSteps[T]:
    """Sample `requests`, and what was submitted before, to the end."""
    start = time.perf_counter()
    engine.submit(list(requests))
    seconds, running, finished = [], [], []
    while engine.unfinished:
        began = time.perf_counter()
        running.append(engine.unfinished)
        finished += engine.step()
        seconds.append(time.perf_counter() - began)
    return EngineSteps(seconds, running, finished, time.perf_counter() - start)
