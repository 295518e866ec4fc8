"""Pipeline: moves groups from their prompt to the replay, over workers any of which may be lost.

The way of one group is `group_path`. A prompt leaves it once: admitted, refused, or evaluated. Rows travel by reference
and are never fetched here, but for evaluation. Knows the runtime's protocols; knows neither Ray, engines nor gradients.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from actors.counters import Sampled, WorkerCounters
from actors.replay.admission import Admission
from actors.replay.queue import Replay
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker, RunProgress
from actors.runtime.base import Future, WorkerLost, as_argument
from actors.runtime.supervisor import Supervisor, WorkerSlot
from actors.types import Adapter, Group, Prompt, Purpose, Sampling


@dataclass(eq=False)
class Task:
    """A prompt on its way, and how it is sampled."""

    prompt: Prompt
    sampling: Sampling
    samples: int
    attempt: int = 0


@dataclass(frozen=True)
class Stage:
    """A task at a worker: `future` is its result, or None while a rollout worker samples it among others."""

    slot: WorkerSlot
    future: Future | None = None


# A path yields the stage that it waits for, and is sent the stage's future once that is done.
Path: TypeAlias = Generator[Stage, Future, Admission | Group]


@dataclass
class _Rollout:
    """What the pipeline knows of one rollout worker."""

    run: Future[RunProgress] | None = None
    version: int | None = None
    sampled: Sampled = field(default_factory=Sampled)


@dataclass
class Pipeline:
    """The way from prompts to the replay. `supervisor` holds the workers, which are started through it."""

    supervisor: Supervisor
    _waiting: dict[WorkerSlot, dict[tuple[Purpose, int], Path]] = field(default_factory=dict)
    _rollouts: dict[WorkerSlot, _Rollout] = field(default_factory=dict)
    _adapter: Future[Adapter] | Adapter | None = None
    _admissions: list[Admission] = field(default_factory=list)
    _evaluated: dict[int, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.supervisor.on_replaced = self._on_replaced

    def group_path(self, task: Task) -> Path:
        """The way of one group. After the loss of a worker it goes on at the stage that was lost."""
        group = scored = None
        while True:
            try:
                if group is None:
                    group = yield self._sample(task)
                if scored is None:
                    scored = yield self._score(task, group)
                if task.prompt.purpose == "evaluate":
                    return scored.result()
                admission = yield self._admit(scored)
                return admission.result()
            except WorkerLost as lost:
                self.supervisor.replace_lost(lost)
                if lost.kind == "reward":
                    scored = None
                elif lost.kind != "replay":
                    group = scored = None
                    task.attempt += 1

    # The stages

    def _sample(self, task: Task) -> Stage:
        slot = self._least_busy("rollout")
        future = slot.submit(RolloutWorker.dispatch, [task.prompt], task.sampling, task.samples, task.attempt)
        self.supervisor.watch(slot, future, lambda done: done.result())
        return Stage(slot)

    def _score(self, task: Task, group: Future[Group]) -> Stage:
        slot = self._least_busy("reward")
        evaluate = task.prompt.purpose == "evaluate"
        return Stage(slot, slot.submit(RewardWorker.score, as_argument(group), evaluate))

    def _admit(self, scored: Future[Group]) -> Stage:
        slot = self.supervisor.slot("replay")
        return Stage(slot, slot.submit(Replay.admit, as_argument(scored)))

    # What the run asks for

    def dispatch(self, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> None:
        """Start a group of `samples` completions of each prompt."""
        for prompt in prompts:
            path = self.group_path(Task(prompt, sampling, samples))
            self._wait_for(prompt.key, path, next(path))

    def poll(self, *others: Future, seconds: float = 1.0) -> list[Admission]:
        """Sample, score and store until something finishes, or one of `others` is done.

        Returns what the replay said of the groups that have reached it.
        """
        for slot in self._slots("rollout"):
            rollout = self._rollout(slot)
            if self._waiting.get(slot) and rollout.run is None:
                rollout.run = slot.submit(RolloutWorker.run_engine)
                self.supervisor.watch(slot, rollout.run, lambda done, slot=slot: self._on_progress(slot, done))
        self.supervisor.poll(seconds, *others)
        admissions, self._admissions = self._admissions, []
        return admissions

    def broadcast(self, adapter: Future[Adapter] | Adapter) -> None:
        """Pass `adapter` on to every rollout worker, and to those that will replace one."""
        self._adapter = adapter
        for slot in self._slots("rollout"):
            self._load_adapter(slot)

    def wait_for_engines(self) -> None:
        """Wait until every rollout worker has started its engine and loaded the adapter. Nothing may be in flight.

        Raises WorkerLost if the adapter cannot arrive.
        """
        while any(self._rollout(slot).version is None for slot in self._slots("rollout")):
            if not self.supervisor.is_watching:
                raise WorkerLost("learner-0", "its adapter has not arrived")
            self.poll()

    def evaluate(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples: int, *, stop: Callable[[], bool] = lambda: False
    ) -> list[Group] | None:
        """`samples` scored completions of each held-out prompt, in the order of `prompts`; None once `stop` says so.

        Groups that are to be trained go on meanwhile; the next `poll` tells what became of them.
        """
        self.dispatch(prompts, sampling, samples)
        admissions: list[Admission] = []
        while any(prompt.ordinal not in self._evaluated for prompt in prompts) and not stop():
            admissions += self.poll()
        self._admissions = admissions
        if stop():
            return None
        return [self._evaluated.pop(prompt.ordinal) for prompt in prompts]

    def take_counters(self) -> dict[str, WorkerCounters]:
        """The counters of each worker, by name; those of sampling begin again at 0."""
        counters: dict[str, WorkerCounters] = {}
        for slot in self.supervisor.slots:
            line: WorkerCounters = {"in_flight": len(self._waiting.get(slot, ())), "restarts": slot.restarts}
            if slot.kind == "rollout":
                rollout = self._rollout(slot)
                line |= {"version": rollout.version, **rollout.sampled.counters()}
                rollout.sampled = Sampled()
            counters[slot.name] = line
        return counters

    def sleep(self) -> None:
        """The engines give back the memory of their caches. Nothing may be in flight."""
        for slot in self._slots("rollout"):
            slot.submit(RolloutWorker.sleep).result()

    def wake(self) -> None:
        """The engines take that memory again."""
        for slot in self._slots("rollout"):
            slot.submit(RolloutWorker.wake).result()

    # Between the stages

    def _wait_for(self, key: tuple[Purpose, int], path: Path, stage: Stage) -> None:
        self._waiting.setdefault(stage.slot, {})[key] = path
        if stage.future is not None:
            self.supervisor.watch(stage.slot, stage.future, lambda done: self._on_done(stage.slot, key, done))

    def _on_done(self, slot: WorkerSlot, key: tuple[Purpose, int], future: Future) -> None:
        """Send the result of a stage to its path, and let that go on to the next."""
        path = self._waiting[slot].pop(key)
        try:
            stage = path.send(future)
        except StopIteration as end:
            if isinstance(end.value, Admission):
                self._admissions.append(end.value)
            else:
                self._evaluated[end.value.prompt.ordinal] = end.value
        else:
            self._wait_for(key, path, stage)

    def _on_progress(self, slot: WorkerSlot, future: Future[RunProgress]) -> None:
        rollout = self._rollout(slot)
        rollout.run = None
        progress = future.result()
        rollout.sampled.add(progress)
        for key in progress.finished:
            self._on_done(slot, key, slot.submit(RolloutWorker.pop_group, key))

    def _load_adapter(self, slot: WorkerSlot) -> None:
        if self._adapter is not None:
            adapter = self._adapter if isinstance(self._adapter, Adapter) else as_argument(self._adapter)
            future = slot.submit(RolloutWorker.load_adapter, adapter)
            self.supervisor.watch(slot, future, lambda done: self._on_loaded(slot, done))

    def _on_loaded(self, slot: WorkerSlot, future: Future[int]) -> None:
        self._rollout(slot).version = future.result()

    def _on_replaced(self, slot: WorkerSlot, lost: WorkerLost) -> None:
        """Give a new rollout worker the adapter, and let every path that waited for the lost worker go on."""
        if slot.kind == "rollout":
            self._rollout(slot).run = None
            self._load_adapter(slot)
        for key, path in self._waiting.pop(slot, {}).items():
            self._wait_for(key, path, path.throw(WorkerLost(slot.name, lost.reason)))

    def _rollout(self, slot: WorkerSlot) -> _Rollout:
        return self._rollouts.setdefault(slot, _Rollout())

    def _slots(self, kind: str) -> list[WorkerSlot]:
        return [slot for slot in self.supervisor.slots if slot.kind == kind]

    def _least_busy(self, kind: str) -> WorkerSlot:
        return min(self._slots(kind), key=lambda slot: len(self._waiting.get(slot, ())))
