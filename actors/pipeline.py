"""Pipeline: the road from prompts to the replay, over workers any of which may be lost on the way.

It keeps one call of `pump` open on each rollout worker, passes finished groups on to the reward workers and scored ones to
the replay, all by reference, and remembers what is where. A lost worker is replaced, gets the current adapter, and what
it had is sampled or scored again: a prompt leaves this road once, admitted, given up or evaluated. Knows the runtime's
protocols; knows neither Ray, engines nor gradients.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from actors.replay import Replay, Verdict
from actors.reward import RewardWorker
from actors.rollout import Pumped, RolloutWorker
from actors.runtime import OBJECT, Handle, Promise, Runtime, WorkerLost, passed
from actors.types import Adapter, Group, Prompt, Sampling
from conf.errors import UsageError

R = TypeVar("R")


class TooManyLost(UsageError):
    """Workers are lost faster than the run gets on; the message names the last reason."""

    exit_code = 3


@dataclass
class _Task:
    """A prompt on the road, how it is sampled, and its group as far as it has come."""

    prompt: Prompt
    sampling: Sampling
    samples: int
    attempt: int = 0
    group: Promise[Group] | None = None
    scored: Promise[Group] | None = None


@dataclass
class _Member:
    """A worker's place: who holds it, what that one has, and since when it owes an answer."""

    kind: str
    index: int
    handle: Handle[Any]
    open: dict[int, _Task] = field(default_factory=dict)
    pump: Promise[Pumped] | None = None
    version: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    losses: int = 0
    losses_since_step: int = 0
    is_ready: bool = False
    since: float = 0.0


@dataclass(frozen=True)
class _Call:
    """An open call: whose it is, what to do with its promise, and which task is lost with it."""

    member: _Member
    then: Callable[[Promise[Any]], Any]
    task: _Task | None


@dataclass(frozen=True)
class Limits:
    """Seconds without an answer after which a worker counts as hung, before its first answer and after it, and how often one
    may be lost without a step in between."""

    start_seconds: float = float("inf")
    stall_seconds: float = float("inf")
    losses: int = 0


class Pipeline:
    """The workers on the road; `limits` says when one counts as lost, `note` tells the user. Raises TooManyLost."""

    def __init__(self, runtime: Runtime, *, limits: Limits, note: Callable[[str], None]) -> None:
        self._runtime = runtime
        self._limits = limits
        self._note = note
        self._makers: dict[str, Callable[[str], Callable[[], Any]]] = {}
        self._members: list[_Member] = []
        self._calls: dict[Promise[Any], _Call] = {}
        self._adapter: tuple[int, Promise[Adapter]] | None = None
        self._verdicts: list[Verdict] = []
        self._evaluated: dict[int, Group] = {}

    def start(self, kind: str, count: int, maker: Callable[[str], Callable[[], Any]]) -> None:
        """Start `count` workers; `maker(name)` gives the factory of one, now and whenever one is replaced."""
        self._makers[kind] = maker
        self._members += [_Member(kind, i, self._new(kind, i, 0)) for i in range(count)]

    def one(self, kind: str) -> Handle[Any]:
        """The first worker of a kind."""
        return self._of(kind)[0].handle

    # What the run asks for

    def dispatch(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> None:
        """Start a group of each prompt on the rollout worker that has least to do."""
        for prompt in prompts:
            self._sample(_Task(prompt, sampling, samples))

    def work(self, *besides: Promise[Any], seconds: float = 1.0) -> list[Verdict]:
        """Sample, score and queue until something finishes, or one of `besides` is there; what the replay said to the
        groups that reached it."""
        for member in self._of("rollout"):
            if member.open and member.pump is None:
                member.pump = member.handle.submit(RolloutWorker.pump)
                self._await(member, member.pump, partial(self._pumped, member))
        there = self._runtime.wait([*self._calls, *besides], seconds) if self._calls or besides else []
        for promise in there:
            if promise in self._calls:
                self._answered(promise)
        self._end_the_hung()
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    def broadcast(self, version: int, adapter: Promise[Adapter]) -> None:
        """Pass `adapter` on to every rollout worker, and to those that will replace one."""
        self._adapter = (version, adapter)
        for member in self._members:
            member.losses_since_step = 0
        for member in self._of("rollout"):
            self._load(member)

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples: int, *, stop: Callable[[], bool] = lambda: False
    ) -> list[Group] | None:
        """`samples` scored completions of each prompt, in the order of `prompts` (whose ordinals are negative); None once `stop`
        says so. Groups that are to be trained go on meanwhile; what becomes of them the next `work` tells."""
        self.dispatch(prompts, sampling, samples)
        kept: list[Verdict] = []
        while any(prompt.ordinal not in self._evaluated for prompt in prompts):
            kept += self.work()
            if stop():
                self._verdicts = kept
                return None
        self._verdicts = kept
        return [self._evaluated.pop(prompt.ordinal) for prompt in prompts]

    def report(self) -> dict[str, dict[str, Any]]:
        """Of each worker on the road: groups that it has (`open`), how often it was replaced (`losses`), and of rollout workers
        the adapter's `version`, and `tokens_per_second` in the `seconds` of sampling since the last report."""
        found = {}
        for member in self._members:
            line: dict[str, Any] = {"open": len(member.open), "losses": member.losses}
            if member.kind == "rollout":
                rate = member.tokens / member.seconds if member.seconds else 0.0
                line |= {"version": member.version, "tokens_per_second": rate, "seconds": member.seconds}
                member.tokens, member.seconds = 0, 0.0
            found[f"{member.kind}-{member.index}"] = line
        return found

    def lend_cache(self, lend: bool) -> None:
        """The engines release their caches' memory, or take it back."""
        method = RolloutWorker.release_cache if lend else RolloutWorker.restore_cache
        for member in self._of("rollout"):
            member.handle.submit(method).result()

    def renew(self, lost: WorkerLost) -> bool:
        """Replace the worker that `lost` names, if it is still in its place. Returns whether it is one of these, or an object
        on its way between them, so that it makes sense to call again. Raises TooManyLost."""
        for member in self._members:
            if member.handle.name == lost.name:
                self._replace(member, lost.reason)
        return lost.name.partition("-")[0] in (*self._makers, OBJECT)

    def patiently(self, call: Callable[[], R]) -> R:
        """What `call` returns, made again if a worker that can be replaced was lost meanwhile. Raises WorkerLost for others."""
        while True:
            try:
                return call()
            except WorkerLost as lost:
                if not self.renew(lost):
                    raise

    def close(self) -> None:
        for member in self._members:
            member.handle.close()

    # The road

    def _sample(self, task: _Task) -> None:
        member = min(self._of("rollout"), key=lambda m: len(m.open))
        member.open[task.prompt.ordinal] = task
        promise = member.handle.submit(RolloutWorker.dispatch, [task.prompt], task.sampling, task.samples, task.attempt)
        self._await(member, promise)

    def _pumped(self, member: _Member, promise: Promise[Pumped]) -> None:
        member.pump = None
        pumped = promise.result()
        member.tokens += pumped.tokens
        member.seconds += pumped.seconds
        for ordinal in pumped.finished:
            task = member.open.pop(ordinal)
            task.group = member.handle.submit(RolloutWorker.collect, ordinal)
            self._score(task)

    def _score(self, task: _Task) -> None:
        assert task.group is not None
        member = min(self._of("reward"), key=lambda m: len(m.open))
        member.open[task.prompt.ordinal] = task
        task.scored = member.handle.submit(RewardWorker.score, passed(task.group), task.prompt.ordinal < 0)
        self._await(member, task.scored, partial(self._reached, member, task), task)

    def _reached(self, member: _Member, task: _Task, scored: Promise[Group]) -> None:
        """Scored, or lost on the way: whoever asks for the result learns which."""
        del member.open[task.prompt.ordinal]
        if task.prompt.ordinal < 0:
            self._evaluated[task.prompt.ordinal] = scored.result()
        else:
            self._admit(task)

    def _admit(self, task: _Task) -> None:
        assert task.scored is not None
        (member,) = self._of("replay")
        member.open[task.prompt.ordinal] = task
        promise = member.handle.submit(Replay.admit, passed(task.scored))
        self._await(member, promise, partial(self._admitted, member, task), task)

    def _admitted(self, member: _Member, task: _Task, promise: Promise[Verdict]) -> None:
        del member.open[task.prompt.ordinal]
        self._verdicts.append(promise.result())

    def _load(self, member: _Member) -> None:
        if self._adapter is not None:
            version, adapter = self._adapter
            promise = member.handle.submit(RolloutWorker.load_adapter, passed(adapter))
            self._await(member, promise, partial(self._loaded, member, version))

    def _loaded(self, member: _Member, version: int, promise: Promise[None]) -> None:
        promise.result()
        member.version = version

    # Losses

    def _await(
        self, member: _Member, promise: Promise[Any], then: Callable[[Promise[Any]], None] | None = None,
        task: _Task | None = None,
    ) -> None:  # fmt: skip
        if not any(call.member is member for call in self._calls.values()):
            member.since = time.monotonic()
        self._calls[promise] = _Call(member, then or (lambda promise: promise.result()), task)

    def _answered(self, promise: Promise[Any]) -> None:
        call = self._calls.pop(promise)
        call.member.since, call.member.is_ready = time.monotonic(), True
        try:
            call.then(promise)
        except WorkerLost as lost:
            self.renew(lost)
            if call.task is not None:
                self._again(call.task, lost)

    def _again(self, task: _Task, lost: WorkerLost) -> None:
        """A group was lost on its way: take it up where it still is."""
        if lost.name.startswith("replay"):
            self._admit(task)
        elif lost.name.startswith("reward"):
            self._score(task)
        else:
            task.attempt += 1
            self._sample(task)

    def _replace(self, member: _Member, reason: str) -> None:
        member.losses += 1
        member.losses_since_step += 1
        if member.losses_since_step > self._limits.losses:
            raise TooManyLost(
                f"{member.kind}-{member.index} was lost {member.losses_since_step} times without a step in between; the last "
                f"time: {reason}"
            )
        self._note(f"lost {member.handle.name} ({reason}); another takes its place")
        member.handle.kill()
        self._calls = {promise: call for promise, call in self._calls.items() if call.member is not member}
        tasks, member.open, member.pump, member.is_ready = list(member.open.values()), {}, None, False
        member.handle = self._new(member.kind, member.index, member.losses)
        if member.kind == "rollout":
            self._load(member)
        for task in tasks:
            self._again(task, WorkerLost(member.kind, reason))

    def _end_the_hung(self) -> None:
        now = time.monotonic()
        for member in {id(call.member): call.member for call in self._calls.values()}.values():
            limit = self._limits.stall_seconds if member.is_ready else self._limits.start_seconds
            if now - member.since > limit:
                self._replace(member, f"no answer for {now - member.since:.0f} s")

    def _of(self, kind: str) -> list[_Member]:
        return [member for member in self._members if member.kind == kind]

    def _new(self, kind: str, index: int, losses: int) -> Handle[Any]:
        name = f"{kind}-{index}" + (f"#{losses}" if losses else "")
        return self._runtime.start(kind, self._makers[kind](name), name=name)
