"""Session: what surrounds the loop in launch.py. It builds the workers, keeps the run folder, scores, evaluates,
records and resumes.

Knows every package; holds no mathematics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
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
    build_reward_worker,
    build_rows,
    choose_engine,
)
from actors.engine import Engine
from actors.ledger import Ledger
from actors.replay import Replay
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker
from actors.runtime import Handle, LocalRuntime
from actors.schema import to_batch
from actors.sources import DataError
from actors.types import Adapter, Group, Prompt, Sampling
from conf.errors import UsageError
from conf.schema import Settings
from learner import checkpoint
from learner.build import build_learner, draw
from learner.learner import StepStats
from report import evaluation, metrics
from report.run_folder import RunFolder
from report.table import Progress, show_evaluations
from rewards.sample import Sample

HOPELESS = 8  # batches in a row of which nothing can be scored


class Session:
    """The workers of a run and its state on disk. Raises UsageError for what a user can put right.

    `engine` is used in place of a new one, so that several runs in one process can share it.
    """

    def __init__(self, settings: Settings, console: Console, *, engine: Engine | None = None) -> None:
        self.settings = s = settings
        self._console = console
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.folder = RunFolder(Path(s.run.folder))
        runtime = LocalRuntime()
        self._rewards: list[Handle[RewardWorker]] = [
            runtime.start(lambda: build_reward_worker(s), background=True) for _ in range(s.reward.workers)
        ]
        rows, held_out_rows = build_rows(s)
        machine = build_machine(s)
        self._source, tokenizer = build_model_source(s)
        self.prompts = build_prompts(s, rows, held_out_rows, tokenizer)
        self._introduce(rows.prompt_column, rows.answer_column, rows.bad)
        self._check_gold(has_answers=rows.answer_column is not None)

        blueprint = draw(s, machine, self._source)
        self.settings = s = blueprint.settings
        name, reason = choose_engine(s, machine)
        self._note(f"engine {name} ({reason}) on {machine.device} in {machine.dtype}; model {self._source.origin}")
        if s.model.dtype == "bfloat16" and machine.dtype == "float16":
            self._note("this card has no bfloat16: computing in float16 instead")
        for line in blueprint.notes:
            self._note(line)

        self._identity = self._describe()
        self.folder.claim(self._identity, dataclasses.asdict(s), resume=s.run.resume)
        resumed = checkpoint.find(self.folder.checkpoints, s.run.resume)
        engine = engine or build_engine(s, machine, name, self._source, tokenizer, blueprint.layout)
        self.learner, origin = build_learner(blueprint, machine, self._source, engine=engine)
        self._note(f"the learner's base weights: {origin}")
        self.ledger = Ledger()
        if resumed is not None:
            checkpoint.load(resumed, self.learner)
            self.ledger = Ledger.restore(resumed.state["ledger"])
            self._note(f"going on from {resumed.folder} (step {self.learner.version} of {s.run.steps})")
        self.replay = self._recover()

        sampling = Sampling(s.sampling.temperature, s.sampling.max_tokens)
        self._rollouts: list[Handle[RolloutWorker]] = [
            runtime.start(lambda: RolloutWorker(engine, sampling, group_size=s.algorithm.group_size, seed=s.run.seed))
        ]
        self.broadcast(self.learner.adapter())
        self._metrics = metrics.MetricsLog(self.folder.metrics, self.folder.tensorboard, last_step=self.learner.version)
        self._progress = Progress(console, s.run.steps).__enter__()
        self._scoring: set[Future[Group]] = set()
        self._next_reward = 0
        self._unscorable = 0
        self._hopeless = 0
        self._last_error = ""
        self._tokens, self._rollout_seconds = 0, 0.0
        self._started = time.monotonic()
        gc.freeze()  # millions of objects of models and libraries that no collection need look at again

    # Rollout and scoring

    def dispatch(self, ordinals: Sequence[int]) -> None:
        """Start the groups of these ordinals on the rollout workers in turn."""
        shares: list[list[Prompt]] = [[] for _ in self._rollouts]
        for ordinal in ordinals:
            shares[ordinal % len(shares)].append(self.prompts.at(ordinal))
        for worker, share in zip(self._rollouts, shares, strict=True):
            if share:
                worker.submit(RolloutWorker.dispatch, share).result()

    def pump(self) -> list[Group]:
        """Let the rollout workers sample until some group finishes."""
        groups: list[Group] = []
        for worker in self._rollouts:
            pumped = worker.submit(RolloutWorker.pump).result()
            groups += pumped.groups
            self._tokens += pumped.tokens
            self._rollout_seconds += pumped.seconds
        return groups

    def scored(self, groups: Iterable[Group]) -> list[pa.RecordBatch]:
        """Hand `groups` to the reward workers; return what has been scored by now, less the unscorable.

        Scoring runs beside sampling. If sampling brought nothing, this waits for a score.
        """
        groups = list(groups)
        self._scoring |= {self._score(group) for group in groups}
        timeout = 0.0 if groups else 1.0
        done, self._scoring = (
            wait(self._scoring, timeout=timeout, return_when=FIRST_COMPLETED) if self._scoring else (set(), set())
        )
        good: list[pa.RecordBatch] = []
        for future in done:
            group = future.result()
            if self._has_quorum(group):
                good.append(to_batch(group))
            else:
                self._give_up(group)
        return good

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Within, the learner has the memory of the engine's cache, if the memory plan says that it needs it."""
        lenders = self._rollouts if self.settings.engine.release_cache else []
        for worker in lenders:
            worker.submit(RolloutWorker.release_cache).result()
        try:
            yield
        finally:
            for worker in lenders:
                worker.submit(RolloutWorker.restore_cache).result()

    def broadcast(self, adapter: Adapter) -> None:
        """Pass `adapter` to every rollout worker."""
        for future in [worker.submit(RolloutWorker.load_adapter, adapter) for worker in self._rollouts]:
            future.result()

    def _score(self, group: Group, evaluate: bool = False) -> Future[Group]:
        self._next_reward = (self._next_reward + 1) % len(self._rewards)
        return self._rewards[self._next_reward].submit(RewardWorker.score, group, evaluate)

    def _has_quorum(self, group: Group) -> bool:
        scorable = sum(score.reward is not None for score in group.scores)
        self._unscorable += len(group.scores) - scorable
        self._last_error = next((score.error for score in group.scores if score.error), self._last_error)
        return scorable >= max(2, math.ceil(self.settings.reward.quorum * len(group.scores)))

    def _give_up(self, group: Group) -> None:
        self.ledger.finish([group.prompt.ordinal], given_up=True)
        self._hopeless += 1
        if self._hopeless > HOPELESS * self.settings.algorithm.prompts_per_step:
            raise UsageError(
                f"{self._hopeless} groups in a row could not be scored; the last reason: {self._last_error}"
            )

    # What a step leaves behind

    def record(self, table: pa.Table, stats: StepStats) -> None:
        """Write the step's metrics and completions, and show them."""
        row = metrics.step_row(
            table, stats, version=self.learner.version, rollout_tokens=self._tokens, rollout_seconds=self._rollout_seconds,
            seconds=time.monotonic() - self._started, unscorable=self._unscorable, given_up=self.ledger.given_up,
        )  # fmt: skip
        self._metrics.write(row)
        metrics.write_completions(self.folder.completions, self.learner.version, table)
        self._progress.step(row)
        self._unscorable = self._hopeless = self._tokens = 0
        self._rollout_seconds, self._started = 0.0, time.monotonic()

    def evaluate_once(self) -> None:
        """Evaluate this version unless that has been recorded already (a run that goes on)."""
        recorded = metrics.read(self.folder.evaluations)
        if not recorded or (recorded[-1]["step"] < self.learner.version == self.settings.run.steps):
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate on the held-out prompts, greedy and sampled, and record it."""
        s, started = self.settings, time.monotonic()
        prompts = self.prompts.held_out[: s.evaluation.max_prompts]
        greedy = evaluation.accuracy(self._answers(prompts, temperature=0.0, samples=1))
        sampled = None
        if s.evaluation.samples:
            sampled = evaluation.accuracy(
                self._answers(prompts, temperature=s.sampling.temperature, samples=s.evaluation.samples)
            )
        constant = evaluation.best_constant([prompt.answer for prompt in prompts])
        row = evaluation.record(self.learner.version, greedy, sampled, constant, time.monotonic() - started)
        with self.folder.evaluations.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        drawn = f", sampled {sampled.lenient:.1%}" if sampled else ""
        self._note(f"evaluation at step {self.learner.version}: greedy {greedy.lenient:.1%}{drawn}")
        self._started = time.monotonic()

    def _answers(self, prompts: Sequence[Prompt], *, temperature: float, samples: int) -> list[Group]:
        sampling = Sampling(temperature, self.settings.sampling.max_tokens)
        futures = [
            self._score(group, True)
            for group in self._rollouts[0].submit(RolloutWorker.evaluate, prompts, sampling, samples).result()
        ]
        return [future.result() for future in futures]

    def save(self) -> None:
        """Write a checkpoint, then let go of the journal that it makes needless."""
        state = {
            "ledger": self.ledger.state(),
            "settings": dataclasses.asdict(self.settings),
            "identity": self._identity,
        }
        folder = checkpoint.save(
            self.folder.checkpoints, self.learner, state, base_model=self.settings.model.path,
            keep=self.settings.run.keep_checkpoints,
        )  # fmt: skip
        self.replay.release(self.ledger.is_finished)
        self._note(f"saved {folder}")

    def finish(self) -> None:
        """Evaluate the trained adapter, write it in PEFT layout, and show what training did."""
        self.evaluate_once()
        checkpoint.save_adapter(self.folder.adapter, self.learner.adapter(), base_model=self.settings.model.path)
        self._progress.__exit__(None, None, None)
        show_evaluations(self._console, metrics.read(self.folder.evaluations))
        self._note(f"the adapter is in {self.folder.adapter}, curves and completions beside it")

    def close(self) -> None:
        """Stop the workers and let go of the folder."""
        self._progress.__exit__(None, None, None)
        for handle in [*self._rewards, *self._rollouts]:
            handle.close()
        self._metrics.close()
        self.replay.close()
        self.folder.close()

    # Before the first step

    def _introduce(self, prompt_column: str, answer_column: str | None, bad: Sequence[str]) -> None:
        prompts = self.prompts
        self._note(
            f"data {self.settings.data.source}: {prompts.size} prompts to train on, {len(prompts.held_out)} held out; "
            f"prompt from {prompt_column!r}, answer from {answer_column!r}"
        )
        if bad:
            self._note(f"skipped {len(bad)} bad rows, the first: {bad[0]}")
        if prompts.overlap:
            self._note(f"{prompts.overlap} of the held-out prompts are trained on, too")
        if prompts.too_long:
            self._note(f"left out {prompts.too_long} prompts of over {self.settings.data.max_prompt_tokens} tokens")

    def _check_gold(self, *, has_answers: bool) -> None:
        prompt = self.prompts.at(0)
        self._note(f"the first prompt, as the model sees it:\n{prompt.text}")
        if prompt.answer is None or not has_answers:
            return
        worker = self._rewards[0]
        completion, full = worker.submit(RewardWorker.gold, prompt.answer).result()
        sample = Sample(prompt.question, completion, prompt.answer, prompt.task, metadata=json.loads(prompt.metadata))
        score = worker.submit(RewardWorker.score_sample, sample).result()
        self._note(
            f"its gold answer {prompt.answer!r} scores {score.reward} of {full:g}"
            + (f" ({score.error})" if score.error else "")
        )
        if self.settings.reward.check_gold and (score.reward is None or score.reward < full - 1e-9):
            raise DataError(
                f"the gold answer {completion!r} does not score full marks ({score.terms}): check the reward and "
                "data.answer_column, or set reward.check_gold=false"
            )

    def _describe(self) -> dict[str, Any]:
        """What must stay the same for a run to go on."""
        s = self.settings
        return {
            "model.path": s.model.path, "model.quantization": s.model.quantization,
            "model.keep_16bit": list(s.model.keep_16bit), "model.lora.rank": s.model.lora.rank,
            "model.lora.alpha": s.model.lora.alpha, "model.lora.target_modules": sorted(s.model.lora.target_modules),
            "algorithm.name": s.algorithm.name, "algorithm.group_size": s.algorithm.group_size,
            "data.source": s.data.source, "the training prompts (hash)": self.prompts.fingerprint(), "run.seed": s.run.seed,
        }  # fmt: skip

    def _recover(self) -> Replay:
        """The replay with what was acknowledged, is not trained and may still be.

        Strictly on-policy, a batch is kept only if it is whole: half a batch sampled again beside a half from the
        journal would differ in its last bits from the batch of a run that was never interrupted.
        """
        s, version = self.settings, self.learner.version
        batch_size = s.algorithm.prompts_per_step
        replay = Replay(self.folder.journal, capacity=2 * batch_size * (1 + s.runtime.max_staleness))

        def usable(batch: pa.RecordBatch) -> bool:
            versions = [span["version"] for spans in batch.column("version_spans").to_pylist() for span in spans]
            fresh = max(versions) <= version and version - min(versions) <= s.runtime.max_staleness
            return fresh and not self.ledger.is_finished(batch.column("ordinal")[0].as_py())

        replay.recover(usable)
        if s.runtime.max_staleness == 0 and len(replay) < batch_size:
            replay.clear()
        held = replay.oldest(len(replay))
        self.ledger.open |= dict.fromkeys(held, version)
        if held or replay.torn_bytes:
            self._note(f"{len(held)} scored groups recovered from the journal; {replay.torn_bytes} torn bytes cut")
        return replay

    def _note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
