"""Trainer: what the loop in launch.py calls. It owns the version, the step in flight, and what a run leaves on disk.

Knows every package; holds no mathematics.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import pyarrow as pa

from actors.engines.base import Engine
from actors.ledger import Ledger
from actors.replay.queue import Replay
from actors.runtime.base import Future, as_argument
from actors.types import Group, Prompt, Sampling
from conf.schema import Settings
from epiphany import recovery
from epiphany.assembly import StartedRun, start_run
from epiphany.preflight import Checked
from epiphany.report import evaluation, gaming, metrics
from epiphany.report.finished import adapter_line
from epiphany.report.recorder import Recorder
from epiphany.report.table import LiveTable
from epiphany.sampling import evaluation_sampling, training_sampling
from epiphany.step_counters import StepCounters
from epiphany.use.report import report_of_finished
from epiphany.warm_up import warm_up
from learner.parallel.group import StepFuture
from learner.parallel.worker import LearnerWorker

MAX_UNSCORABLE_BATCHES = 8  # in a row


@dataclass(frozen=True)
class StepInFlight:
    """The groups that the learner trains on now, and its answer."""

    ordinals: list[int]
    future: StepFuture


class Trainer:
    """A run: its workers, started, and its state on disk. Raises UsageError for what a user can correct.

    What is opened is closed by `closing`. `engine` is used instead of a new one, so that several runs in one process
    can share it; `stop` tells whether the run was asked to end.
    """

    def __init__(
        self,
        settings: Settings,
        checked: Checked,
        table: LiveTable,
        *,
        closing: ExitStack,
        engine: Engine | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stop, self._table = stop, table
        self._run: StartedRun = start_run(settings, checked, note=table.note, closing=closing, engine=engine)
        self.settings, self.folder, self.pipeline = settings, self._run.folder, self._run.pipeline
        self.ledger, self.version = Ledger(), 0
        resumed = self._run.learners.resume(settings.run.resume)
        self._is_warm = resumed is not None or self._run.demonstrations is None
        if resumed is not None:
            self.ledger, self.version = recovery.ledger_of(resumed), resumed.version
            self._run.prompts.restore(recovery.order_of(resumed))
            table.note(f"resuming from {resumed.folder} (step {self.version} of {settings.run.steps})")
            for line in resumed.notes:
                table.note(line)
        self._step: StepInFlight | None = None
        for line in self._run.start_replay(self.ledger, version=self.version):
            table.note(line)
        self.pipeline.broadcast(self._run.learners.first.submit(LearnerWorker.adapter))
        self._run.start_recorder(last_step=self.version)
        self.pipeline.wait_for_engines()
        self._counters = self._new_counters()

    # The loop's verbs

    def warm_up(self) -> None:
        """Learn from demonstrations before the first rollout, unless warmup.steps=0 or that is done already."""
        if self._is_warm or self._run.demonstrations is None:
            return
        with self._engine_asleep(), self._table.activity("learning from demonstrations"):
            line = warm_up(
                self._run.learners,
                self._run.demonstrations,
                self.settings.warmup,
                seed=self.settings.run.seed,
                log=self.folder.warmup,
                stop=self._stop,
            )
        if line is not None:
            self._table.note(line)
            self._is_warm = True
            self.pipeline.broadcast(self._run.learners.first.submit(LearnerWorker.adapter))
            self.save()
            self._counters.restart_clock()

    def free_slots(self) -> int:
        """How many groups may start now: a batch for the version in training, and one for each that may lag behind.

        If a run must repeat bit by bit, resampled groups start only after the rest of the batch: what shares an
        engine's batch changes the last bits of log-probabilities.
        """
        if self._run.samples_repeat and len(self.ledger.in_flight) > len(self.ledger.stored):
            return 0
        batches = 1 + self.settings.runtime.max_staleness
        return self.settings.algorithm.prompts_per_step * batches - len(self.ledger.in_flight)

    def sample(self, count: int) -> None:
        """Start `count` groups."""
        prompts = [self._run.prompts.at(ordinal) for ordinal in self.ledger.next(count, version=self.version)]
        sampling = training_sampling(self.settings)
        self.pipeline.dispatch(prompts, sampling, self.settings.algorithm.group_size)

    def next_batch(self) -> list[int] | None:
        """The groups of the next step, once they are stored and the step leaves none too old that is still sampled.

        With runtime.max_staleness=0 that is any group at all: the engines are drained before each update.
        """
        size = self.settings.algorithm.prompts_per_step
        batch = sorted(self.ledger.stored)[:size]
        oldest = self.ledger.oldest_version(besides=batch)
        is_too_old = oldest is not None and self.version + 1 - oldest > self.settings.runtime.max_staleness
        return batch if len(batch) == size and not is_too_old else None

    @property
    def is_learning(self) -> bool:
        return self._step is not None

    def start_step(self, ordinals: list[int]) -> None:
        """Let the learner step on these groups; in one process the step is done when this returns."""
        self._run.supervisor.retry_on_worker_loss(lambda: self._run.learners.send(self._rows(ordinals)))
        with self._engine_asleep():
            self._step = StepInFlight(ordinals, self._run.learners.step())

    def step_done(self) -> bool:
        """Whether a step is in flight and every learner has done it."""
        return self._step is not None and not self._step.future.pending()

    def poll(self) -> None:
        """Sample, score and store until something finishes, or the learner does."""
        learners = self._step.future.pending() if self._step is not None else []
        for admission in self.pipeline.poll(*learners):
            if admission.accepted:
                self.ledger.stored.add(admission.ordinal)
            else:
                self.ledger.finish([admission.ordinal], dropped=True)
                if admission.zero_variance:
                    self._run.prompts.record([admission.ordinal], solved=[admission.ordinal] * admission.solved)
            self._counters.add(admission)

    def complete_step(self) -> None:
        """Wait for the step, pass the new adapter on, remove the rows from the replay, and record what happened."""
        assert self._step is not None
        ordinals, stats = self._step.ordinals, self._step.future.stats()
        self.pipeline.broadcast(self._run.learners.first.submit(LearnerWorker.adapter))
        self._run.supervisor.count_step()
        numbers = self._counters.numbers(self.pipeline.take_counters(), dropped=self.ledger.dropped)
        logprobs = as_argument(self._run.learners.first.submit(LearnerWorker.policy_logprobs))
        row = self._run.supervisor.retry_on_worker_loss(
            lambda: (
                self._run.supervisor.slot("recorder")
                .submit(Recorder.record, as_argument(self._rows(ordinals)), logprobs, stats, numbers)
                .result()
            )
        )
        self._table.step(row)
        self._run.prompts.record(ordinals, solved=row["solved"])
        self._run.prompts.end_step()
        self._step, self.version = None, stats.version
        self.ledger.finish(ordinals)
        self._run.supervisor.slot("replay").submit(Replay.drop, ordinals)
        self._counters = self._new_counters()

    # What a run leaves behind

    def evaluate_once(self) -> None:
        """Evaluate this version unless that is recorded already (a run that was resumed)."""
        recorded = metrics.read(self.folder.evaluations)
        if not recorded or (recorded[-1]["step"] < self.version == self.settings.run.steps):
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate on the held-out prompts, greedy and sampled, and record it; given up if the run is asked to stop."""
        settings, started = self.settings, time.monotonic()
        prompts = self._run.prompts.held_out[: settings.evaluation.max_prompts]
        with self._table.activity(f"evaluating step {self.version} on {len(prompts)} held-out prompts"):
            sampling = evaluation_sampling(settings)
            greedy = self._answers(prompts, replace(sampling, temperature=0.0), samples=1)
            sampled: list[Group] | None = []
            if settings.evaluation.samples and greedy is not None:
                sampled = self._answers(prompts, sampling, samples=settings.evaluation.samples)
        if greedy is None or sampled is None:
            return
        seconds, reward = time.monotonic() - started, self._run.reward_fingerprint
        record = evaluation.record(self.version, greedy, sampled, seconds=seconds, reward=reward)
        evaluation.save(self.folder, record, greedy, sampled, temperature=sampling.temperature)
        for line in gaming.lines_of_evaluation(self.folder, record, settings.reward.terms):
            self._table.note(line)
        self.pipeline.take_counters()  # the next step's counters begin here
        self._counters.restart_clock()

    def save(self) -> None:
        """Write a checkpoint, then release the journal's rows that it makes needless."""
        if not self._is_warm:  # it was interrupted, and begins again
            return
        prompts = self._run.prompts.checkpoint()
        state = {"ledger": self.ledger.state(), "prompts": prompts, "identity": self._run.identity}
        folder = self._run.learners.call(LearnerWorker.save, state)
        self._run.supervisor.retry_on_worker_loss(
            lambda: self._run.supervisor.slot("replay").submit(Replay.release, self.ledger.is_finished).result()
        )
        self._table.note(f"saved {folder}")

    def finish(self) -> None:
        """Evaluate the trained adapter, write it in PEFT layout, write the report, and show what training did."""
        self.evaluate_once()
        if self._stop():
            return
        self._run.learners.call(LearnerWorker.save_adapter, self.folder.adapter.resolve())
        self._table.finish(metrics.read(self.folder.evaluations))
        self._table.note(f"{adapter_line(self.folder)}; its base model is {self._run.base_model}")
        report_of_finished(self.settings, self._table.note)

    def _answers(self, prompts: Sequence[Prompt], sampling: Sampling, *, samples: int) -> list[Group] | None:
        return self.pipeline.evaluate(prompts, sampling, samples, stop=self._stop)

    def _rows(self, ordinals: list[int]) -> Future[pa.Table]:
        replay, max_staleness = self._run.supervisor.slot("replay"), self.settings.runtime.max_staleness
        return replay.submit(Replay.batch, ordinals, self.version, max_staleness)

    @contextmanager
    def _engine_asleep(self) -> Iterator[None]:
        """Within, the learner has the memory of the engine's cache, if the plan needs that."""
        if not self._run.sleep_mode:
            yield
            return
        self.pipeline.sleep()
        try:
            yield
        finally:
            self.pipeline.wake()

    def _new_counters(self) -> StepCounters:
        return StepCounters(max_unscorable_groups=MAX_UNSCORABLE_BATCHES * self.settings.algorithm.prompts_per_step)
