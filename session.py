"""Session: what surrounds the loop in launch.py. It makes the workers, keeps the run folder, evaluates, records and
resumes.

Knows every package; holds no mathematics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from transformers.utils import logging as transformers_logging

from actors.build import (
    build_engine,
    build_machine,
    build_model_source,
    build_prompts,
    build_rows,
    choose_engine,
    lora_arguments,
    samples_repeat,
)
from actors.engine import Engine
from actors.ledger import Ledger
from actors.models import fingerprint
from actors.pipeline import Limits, Pipeline
from actors.replay import Replay
from actors.runtime import Promise, passed
from actors.types import Group, Prompt, Sampling
from conf.check import named_terms
from conf.errors import UsageError
from conf.schema import Settings
from learner.build import Blueprint, draw, settle
from learner.crew import Crew
from learner.ranks import Ranks
from learner.worker import LearnerWorker
from report import evaluation, metrics
from report.opening import check_gold, introduce
from report.recorder import Recorder
from report.run_folder import RunFolder
from report.table import Progress, show_evaluations
from workers import build_runtime, make_learner, make_replay, make_reward, make_rollout, share_cores

HOPELESS = 8  # batches in a row of which nothing can be scored


class RunLost(UsageError):
    """A worker died that nothing can replace: the learner, and what it learned since the last checkpoint with it."""

    exit_code = 3


class Session:
    """The workers of a run and its state on disk. Raises UsageError for what a user can put right.

    `engine` is used in place of a new one, so that several runs in one process can share it.
    """

    def __init__(
        self,
        settings: Settings,
        console: Console,
        *,
        engine: Engine | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._console = console
        self._stop = stop
        self._opened = contextlib.ExitStack()
        try:
            self._start(settings, engine)
        except BaseException:
            self.close()
            raise

    def _start(self, settings: Settings, engine: Engine | None) -> None:
        self.settings = s = share_cores(settings)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.folder = RunFolder(Path(s.run.folder))
        self._opened.callback(self.folder.close)
        self._runtime = runtime = build_runtime(s, self.folder.path.resolve())
        self._opened.callback(runtime.close)
        self.pipeline = Pipeline(runtime, limits=self._limits(), note=self._note)
        self._opened.callback(self.pipeline.close)
        self.pipeline.start("reward", s.runtime.reward_workers, lambda _: partial(make_reward, s))
        rows, held_out_rows = build_rows(s)
        self._source, tokenizer = build_model_source(s)
        self.prompts = build_prompts(s, rows, held_out_rows, tokenizer)
        introduce(s, rows, self.prompts, self._note)
        check_gold(s, rows, self.prompts, self.pipeline, self._note)
        self.settings = s = settle(s, self._source)
        self._identity = self._describe()

        blueprint: Blueprint | None = None
        self._repeats = False
        for line in self.folder.claim(self._identity, dataclasses.asdict(s), resume=s.run.resume):
            self._note(line)
        if s.runtime.name == "local":
            machine = build_machine(s)
            blueprint = draw(s, machine, self._source)
            self._repeats = samples_repeat(s, machine) and s.runtime.max_staleness == 0
            self.settings = s = blueprint.settings
            name, reason = choose_engine(s, machine)
            self._note(f"engine {name} ({reason}) on {machine.device} in {machine.dtype}; model {self._source.origin}")
            if s.model.dtype == "bfloat16" and machine.dtype == "float16":
                self._note("this card has no bfloat16: computing in float16 instead")
            for line in blueprint.notes:
                self._note(line)
            if engine is None:
                engine = build_engine(s, machine, name, self._source, tokenizer, blueprint.layout)

        checkpoints = self.folder.checkpoints.resolve()
        self.pipeline.start("rollout", s.runtime.rollout_workers, lambda name: partial(make_rollout, s, name, engine))
        count, mark = s.runtime.learner_ranks, self.folder.lock.read_text()
        ranks = [
            runtime.start(
                "learner",
                partial(make_learner, s, checkpoints, mark, Ranks(i, count), blueprint, engine),
                name=f"learner-{i}",
            )
            for i in range(count)
        ]
        self.crew = Crew(runtime, ranks, seconds=s.runtime.learner_seconds)
        self._opened.callback(self.crew.close)
        for line in self.crew.ask(LearnerWorker.notes):
            self._note(line)
        self.ledger, self.version = Ledger(), 0
        resumed = self.crew.resume(s.run.resume)
        if resumed is not None:
            where, state = resumed
            self.ledger, self.version = Ledger.restore(state["ledger"]), state["version"]
            self._note(f"going on from {where} (step {self.version} of {s.run.steps})")
        self._held: set[int] = set()
        self._recover()
        self._broadcast(self.version)

        files = [f.resolve() for f in (self.folder.metrics, self.folder.tensorboard, self.folder.completions)]
        self.pipeline.start("recorder", 1, lambda _: partial(Recorder, *files, last_step=self.version))
        self._progress = self._opened.enter_context(Progress(self._console, s.run.steps))
        self._sampling = Sampling(s.sampling.temperature, s.sampling.max_tokens)
        self._batch: list[int] = []
        self._unscorable = self._resampled = self._hopeless = 0
        self._started = time.monotonic()
        gc.freeze()  # millions of objects of models and libraries that no collection need look at again

    # The loop's verbs

    def room(self, free: int) -> int:
        """How many of `free` groups may start now. Where a run is to be repeated bit by bit, those that take another's place
        wait until the rest of the batch is there: what shares an engine's batch moves the last bits of log-probabilities."""
        return 0 if self._repeats and len(self.ledger.open) > len(self._held) else free

    def dispatch(self, ordinals: Sequence[int]) -> None:
        """Start the groups of these ordinals."""
        self.pipeline.dispatch(
            [self.prompts.at(ordinal) for ordinal in ordinals], self._sampling, self.settings.algorithm.group_size
        )

    def ready(self, count: int) -> list[int]:
        """The `count` lowest ordinals that the replay holds."""
        return sorted(self._held)[:count]

    def work(self) -> None:
        """Sample, score and queue until something finishes, or the learner does."""
        for verdict in self.pipeline.work(*self.crew.pending):
            self._unscorable += verdict.unscorable
            if verdict.accepted:
                self._held.add(verdict.ordinal)
                continue
            self.ledger.finish([verdict.ordinal], given_up=True)
            if verdict.is_flat:
                self._resampled += 1
            else:
                self._count_hopeless(verdict.error)

    def learn(self, ordinals: Sequence[int]) -> None:
        """Let the learner step on these groups; in one process it is done when this returns."""
        self._batch = list(ordinals)
        self._held -= set(ordinals)
        self.pipeline.patiently(lambda: self.crew.hold(self._rows_of_step()))
        with self._cache_lent():
            self.crew.step()

    @property
    def has_learned(self) -> bool:
        """Whether the step that was begun is done."""
        return self.crew.is_done

    def finish_step(self) -> None:
        """Wait for the step, pass the new adapter on, let go of the rows, and write and show what happened."""
        stats = self.crew.stats()
        self._broadcast(self.version + 1)
        numbers = {
            "workers": self.pipeline.report(),
            "seconds": time.monotonic() - self._started, "unscorable": self._unscorable,
            "resampled": self._resampled, "given_up": self.ledger.given_up,
        }  # fmt: skip
        made = self.version + 1
        row = self.pipeline.patiently(
            lambda: (
                self.pipeline.one("recorder")
                .submit(Recorder.record, passed(self._rows_of_step()), stats, made, numbers)
                .result()
            )
        )
        self._progress.step(row)
        self.version = made
        self.ledger.finish(self._batch)
        self.pipeline.one("replay").submit(Replay.drop, self._batch)
        self._unscorable = self._resampled = self._hopeless = 0
        self._started = time.monotonic()

    def _rows_of_step(self) -> Promise[pa.Table]:
        replay, max_staleness = self.pipeline.one("replay"), self.settings.runtime.max_staleness
        return replay.submit(Replay.batch, self._batch, self.version, max_staleness)

    @contextlib.contextmanager
    def _cache_lent(self) -> Any:
        """Within, the learner has the memory of the engine's cache, if the memory plan says that it needs it."""
        lends = bool(self.settings.engine.release_cache)
        if lends:
            self.pipeline.lend_cache(True)
        try:
            yield
        finally:
            if lends:
                self.pipeline.lend_cache(False)

    def _broadcast(self, version: int) -> None:
        self.pipeline.broadcast(version, self.crew.first.submit(LearnerWorker.adapter))

    def _count_hopeless(self, error: str | None) -> None:
        self._hopeless += 1
        if self._hopeless > HOPELESS * self.settings.algorithm.prompts_per_step:
            raise UsageError(f"{self._hopeless} groups in a row could not be scored; the last reason: {error}")

    # What a run leaves behind

    def evaluate_once(self) -> None:
        """Evaluate this version unless that has been recorded already (a run that goes on)."""
        recorded = metrics.read(self.folder.evaluations)
        if not recorded or (recorded[-1]["step"] < self.version == self.settings.run.steps):
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate on the held-out prompts, greedy and sampled, and record it; given up if the run is asked to stop."""
        s, started = self.settings, time.monotonic()
        prompts = self.prompts.held_out[: s.evaluation.max_prompts]
        greedy_groups = self._answers(prompts, temperature=0.0, samples=1)
        sampled_groups = []
        if s.evaluation.samples and greedy_groups is not None:
            sampled_groups = self._answers(prompts, temperature=s.sampling.temperature, samples=s.evaluation.samples)
        if greedy_groups is None or sampled_groups is None:
            return
        greedy = evaluation.accuracy(greedy_groups)
        sampled = evaluation.accuracy(sampled_groups) if sampled_groups else None
        constant = evaluation.best_constant([prompt.answer for prompt in prompts])
        row = evaluation.record(self.version, greedy, sampled, constant, time.monotonic() - started)
        with self.folder.evaluations.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        drawn = f", sampled {sampled.lenient:.1%}" if sampled else ""
        self._note(f"evaluation at step {self.version}: greedy {greedy.lenient:.1%}{drawn}")
        self.pipeline.report()  # the next step's figures begin here
        self._started = time.monotonic()

    def _answers(self, prompts: Sequence[Prompt], *, temperature: float, samples: int) -> list[Group] | None:
        sampling = Sampling(temperature, self.settings.sampling.max_tokens)
        return self.pipeline.evaluate(prompts, sampling, samples, stop=self._stop)

    def save(self) -> None:
        """Write a checkpoint, then let go of the journal that it makes needless."""
        state = {
            "ledger": self.ledger.state(),
            "settings": dataclasses.asdict(self.settings),
            "identity": self._identity,
        }
        folder = self.crew.ask(LearnerWorker.save, state)
        self.pipeline.patiently(
            lambda: self.pipeline.one("replay").submit(Replay.release, self.ledger.is_finished).result()
        )
        self._note(f"saved {folder}")

    def finish(self) -> None:
        """Evaluate the trained adapter, write it in PEFT layout, and show what training did."""
        self.evaluate_once()
        if self._stop():
            return
        self.crew.ask(LearnerWorker.save_adapter, self.folder.adapter.resolve())
        self._progress.__exit__(None, None, None)
        show_evaluations(self._console, metrics.read(self.folder.evaluations))
        self._note(f"the adapter is in {self.folder.adapter}, curves and completions beside it")

    def close(self) -> None:
        """Stop the workers and let go of the folder, as far as they were opened."""
        self._opened.close()

    def _describe(self) -> dict[str, Any]:
        """What must stay the same for a run to go on."""
        s = self.settings
        return {
            "model.path": s.model.path, "model.quantization": s.model.quantization,
            "model.keep_16bit": list(s.model.keep_16bit), "model.lora.rank": s.model.lora.rank,
            "model.lora.alpha": lora_arguments(s)["alpha"], "model.lora.target_modules": sorted(s.model.lora.target_modules),
            "algorithm.name": s.algorithm.name, "algorithm.group_size": s.algorithm.group_size,
            "data.source": s.data.source, "the training prompts": self.prompts.fingerprint(), "run.seed": s.run.seed,
            "the base model's weights": fingerprint(self._source), "model.dtype": s.model.dtype,
            "learner.optimizer": s.learner.optimizer, "sampling.temperature": s.sampling.temperature,
            "reward.terms": [f"{t.weight:g} x {t.name} = {t.fn} {t.options or ''}".strip() for t in named_terms(s.reward.terms)],
        }  # fmt: skip

    def _recover(self) -> None:
        """Start the replay with what was acknowledged, is not trained and may still be.

        Strictly on-policy, a batch is kept only if it is whole: half a batch sampled again beside a half from the
        journal would differ in its last bits from the batch of a run that was never interrupted.
        """
        s = self.settings
        batch_size = s.algorithm.prompts_per_step
        self.pipeline.start("replay", 1, lambda _: self._make_replay())
        held, torn = self.pipeline.patiently(self._held_and_torn)
        if s.runtime.max_staleness == 0:
            # What more is held (prompts_per_step was larger) would be too old once the first batch is trained.
            held = held[:batch_size] if len(held) >= batch_size else []
            self.pipeline.patiently(lambda: self.pipeline.one("replay").submit(Replay.keep, held).result())
        self._held = set(held)
        self.ledger.open |= dict.fromkeys(held, self.version)
        if s.runtime.max_staleness == 0 and held:
            # A whole batch: what was handed out among it and is not in it had been given up.
            gone = [
                o
                for o in range(self.ledger.frontier, max(held))
                if o not in self._held and not self.ledger.is_finished(o)
            ]
            self.ledger.open |= dict.fromkeys(gone, self.version)
            self.ledger.finish(gone, given_up=True)
        if held or torn:
            self._note(f"{len(held)} scored groups recovered from the journal; {torn} torn bytes cut")

    def _held_and_torn(self) -> tuple[list[int], int]:
        replay = self.pipeline.one("replay")
        return replay.submit(Replay.held).result(), replay.submit(Replay.torn).result()

    def _make_replay(self) -> Callable[[], Replay]:
        """How to make a replay now, from its journal."""
        return partial(make_replay, self.settings, self.folder.journal.resolve(), self.ledger, self.version)

    def _limits(self) -> Limits:
        r = self.settings.runtime
        return Limits() if r.name == "local" else Limits(r.start_seconds, r.stall_seconds, r.max_losses)

    def _note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
