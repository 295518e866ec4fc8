"""EnvironmentHost: the environments of many episodes, in child processes that can be killed.

A child runs many episodes beside each other. A request that takes too long costs its episode: its thread cannot be
ended, so that its child takes no new episodes and is killed when the others in it are over. A child that is stuck as a
whole, or that dies, takes all its episodes with it; those that did nothing wrong may begin again. Knows processes;
knows neither engines nor models.
"""

import itertools
import os
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from actors.environments.errors import EnvironmentRefused
from actors.runtime.child_process import ChildLost, ChildProcess
from rewards.user_function import absolute_name

START_SECONDS = 60.0
PONG_SECONDS = 2.0  # in which a process that is not stuck answers
MODULE = "actors.environments.child"


@dataclass(frozen=True)
class Answer:
    """What became of an episode's request: its `value`, or an `error` that the model may see.

    `is_lost`: the episode is over, because it hung or its process died; `may_restart`: not for its own fault.
    """

    episode: int
    value: object = None
    error: str | None = None
    is_lost: bool = False
    may_restart: bool = False


@dataclass
class _Pending:
    """A request that has no answer yet."""

    episode: int
    deadline: float


@dataclass
class _Child:
    """A process, its episodes, and its requests by number. `is_retired`: it takes no new episodes. `pong_by`: until
    when it has to show that it is not stuck.
    """

    process: ChildProcess
    episodes: set[int] = field(default_factory=set)
    pending: dict[int, _Pending] = field(default_factory=dict)
    is_retired: bool = False
    pong_by: float | None = None


class EnvironmentHost:
    """Runs the episodes of one environment, a class named module:Class or file.py:Class, in `children` processes.

    A request may take `deadline_seconds`, a process `memory_gib`. What environments print goes to `log`. `schemas` are
    those of its tools; `has_step` and `has_reward` say which methods it has. Raises EnvironmentRefused if the class
    cannot be used.
    """

    def __init__(
        self,
        environment: str,
        options: Mapping[str, object],
        *,
        children: int,
        deadline_seconds: float,
        memory_gib: float,
        log: Path | None = None,
    ) -> None:
        self._first = {
            "environment": absolute_name(environment),
            "options": dict(options),
            "schemas": None,
            "memory_bytes": int(memory_gib * 2**30),
            "parent": os.getpid(),
            "log": None if log is None else str(log.resolve()),
        }
        self._deadline = deadline_seconds
        self._numbers, self._episodes = itertools.count(), itertools.count()
        self._children: list[_Child] = []
        self._of_episode: dict[int, _Child] = {}
        self._answers: list[Answer] = []
        self.schemas: list[dict[str, Any]] = []
        self.has_step = self.has_reward = False
        for _ in range(children):
            self._children.append(self._start())

    def begin(self, row: Mapping[str, object]) -> int:
        """Start an episode with `reset(**row)`; returns its number. The answer is what `reset` returned."""
        episode = next(self._episodes)
        child = min((c for c in self._children if not c.is_retired), key=lambda c: len(c.episodes))
        child.episodes.add(episode)
        self._of_episode[episode] = child
        self._ask(episode, {"do": "reset", "row": dict(row)})
        return episode

    def call(self, episode: int, tool: str, arguments: Mapping[str, object]) -> None:
        """Call a tool; the answer is a text."""
        self._ask(episode, {"do": "call", "tool": tool, "arguments": dict(arguments)})

    def step(self, episode: int, text: str) -> None:
        """Hand an answer of the model to `step`; the answer is {"text": ..., "done": ...}."""
        self._ask(episode, {"do": "step", "text": text})

    def reward(self, episode: int) -> None:
        """Ask for the episode's reward; the answer is a number or None."""
        self._ask(episode, {"do": "reward"})

    def end(self, episode: int) -> None:
        """Forget an episode, which may have been lost."""
        child = self._of_episode.pop(episode, None)
        if child is None:
            return
        child.episodes.discard(episode)
        if child.is_retired and not child.episodes:
            self._bury(child)
            return
        try:
            child.process.send({"id": next(self._numbers), "episode": episode, "do": "end"})
        except ChildLost as lost:
            self._lose(child, str(lost))

    def poll(self, seconds: float) -> list[Answer]:
        """The answers that are there within `seconds`; returns with the first of them."""
        until = time.monotonic() + seconds
        while True:
            self._receive(max(0.0, min(until, self._next_deadline()) - time.monotonic()))
            self._check_deadlines()
            if self._answers or time.monotonic() >= until:
                answers, self._answers = self._answers, []
                return answers

    def close(self) -> None:
        for child in self._children:
            child.process.kill()
        self._children.clear()

    def _ask(self, episode: int, request: Mapping[str, object]) -> None:
        child, number = self._of_episode.get(episode), next(self._numbers)
        if child is None:
            return  # it was lost meanwhile, which the next poll tells
        child.pending[number] = _Pending(episode, time.monotonic() + self._deadline)
        try:
            child.process.send({"id": number, "episode": episode, **request})
        except ChildLost as lost:
            self._lose(child, str(lost))

    def _receive(self, seconds: float) -> None:
        by_process = {child.process: child for child in self._children}
        ready, _, _ = select.select(list(by_process), [], [], seconds)
        for process in ready:
            child = by_process[process]
            try:
                for message in process.receive_ready():
                    self._take(child, message)
            except ChildLost as lost:
                self._lose(child, str(lost))

    def _take(self, child: _Child, message: object) -> None:
        if not isinstance(message, dict) or not isinstance(message.get("id"), int):
            raise ChildLost("an answer that is none")
        child.pong_by = None  # it is not stuck
        pending = child.pending.pop(message["id"], None)
        if pending is not None:  # else it came too late, or nobody waits for it
            error = message.get("error")
            self._answers.append(Answer(pending.episode, message.get("value"), None if error is None else str(error)))

    def _next_deadline(self) -> float:
        deadlines = [p.deadline for child in self._children for p in child.pending.values()]
        deadlines += [child.pong_by for child in self._children if child.pong_by is not None]
        return min(deadlines, default=float("inf"))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for child in list(self._children):
            if child.pong_by is not None and now >= child.pong_by:
                self._lose(child, "its process was stuck")
                continue
            for number, pending in list(child.pending.items()):
                if now >= pending.deadline:
                    del child.pending[number]
                    self._give_up(child, pending.episode)

    def _give_up(self, child: _Child, episode: int) -> None:
        """An episode's request hangs. Its child goes when its other episodes are over, or at once if it is stuck."""
        self._answers.append(Answer(episode, error=f"no answer within {self._deadline:g} s", is_lost=True))
        child.episodes.discard(episode)
        self._of_episode.pop(episode, None)
        self._retire(child)
        if not child.episodes:
            self._bury(child)
            return
        try:
            child.process.send({"id": next(self._numbers), "episode": -1, "do": "ping"})
        except ChildLost as lost:
            self._lose(child, str(lost))
            return
        child.pong_by = time.monotonic() + PONG_SECONDS

    def _lose(self, child: _Child, reason: str) -> None:
        """A child is gone, and all its episodes are."""
        for episode in sorted(child.episodes):
            self._answers.append(Answer(episode, error=reason, is_lost=True, may_restart=True))
            self._of_episode.pop(episode, None)
        child.episodes.clear()
        self._retire(child)
        self._bury(child)

    def _retire(self, child: _Child) -> None:
        if not child.is_retired:
            child.is_retired = True
            self._children.append(self._start())

    def _bury(self, child: _Child) -> None:
        if child in self._children:
            self._children.remove(child)
            child.process.kill()

    def _start(self) -> _Child:
        process = ChildProcess(MODULE)
        try:
            process.send(self._first)
            ready = cast("dict[str, Any]", process.receive(START_SECONDS))
        except ChildLost as lost:
            process.kill()
            said = process.stderr()
            reason = f"{lost}; it said:\n{said}" if said else f"{lost}"
            raise EnvironmentRefused(f"the process of environments does not start: {reason}") from lost
        if "error" in ready:
            process.kill()
            raise EnvironmentRefused(ready["error"])
        self.schemas, self.has_step, self.has_reward = ready["schemas"], ready["has_step"], ready["has_reward"]
        self._first["schemas"] = self.schemas
        return _Child(process)
