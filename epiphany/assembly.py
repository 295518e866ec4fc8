"""From settings to started workers, in this process or in others. The one branch between the two is
placement.make_runtime.

With `engine`, rollout and learner share it and its weights; without, each builds what it needs where it runs. Models,
and what computes with them, are imported where they are needed: a worker that scores or stores starts without them.
Knows every package but the loop.
"""

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from actors.engines.base import Engine
from actors.ledger import Ledger
from actors.pipeline import Pipeline
from actors.runtime.base import Handle
from actors.runtime.supervisor import Supervisor
from conf.errors import UsageError
from conf.schema import Settings
from epiphany import recovery
from epiphany.identity import identity, reward_fingerprint, user_files
from epiphany.placement import make_runtime, timeouts_of
from epiphany.preflight import Checked
from epiphany.report.recorder import Recorder
from epiphany.report.run_folder import RunFolder, StoredSettings
from epiphany.report.started import write_started
from epiphany.reward_check import make_reward
from epiphany.run_data import RunData, describe_data, load_data, load_model_source
from epiphany.sampling_workers import make_engine, make_rollout

if TYPE_CHECKING:
    from actors.data.demonstrations import Demonstrations
    from actors.data.prompts import PromptSet
    from epiphany.run_plan import RunPlan
    from learner.parallel.data_parallel import DataParallel
    from learner.parallel.group import LearnerGroup
    from learner.parallel.worker import LearnerWorker


@dataclass
class StartedRun:
    """A run whose workers are started, but for the replay and the recorder, which must know where it resumes.

    `base_model` is the folder or hub id of the base weights. `samples_repeat`: the run is to be the same to the last
    bit whenever it is repeated.
    """

    settings: Settings
    folder: RunFolder
    supervisor: Supervisor
    pipeline: Pipeline
    learners: "LearnerGroup"
    prompts: "PromptSet"
    demonstrations: "Demonstrations | None"
    base_model: str
    identity: Mapping[str, object]
    reward_fingerprint: str
    max_scores: Mapping[str, float | None]
    samples_repeat: bool
    sleep_mode: bool

    def start_replay(self, ledger: Ledger, *, version: int) -> list[str]:
        """Start the replay with what a run that died has left in it (recovery.start_replay); lines for the user."""
        return recovery.start_replay(
            self.supervisor,
            self.settings,
            self.folder,
            ledger=ledger,
            version=version,
            max_scores=self.max_scores,
        )

    def start_recorder(self, *, last_step: int) -> None:
        """Start the recorder; lines after `last_step`, of a run that died, are dropped."""
        folder, run = self.folder, self.settings.run
        files = [file.resolve() for file in (folder.metrics, folder.tensorboard, folder.completions)]
        make = partial(
            Recorder,
            *files,
            last_step=last_step,
            sinks=list(run.sinks),
            run_name=run.name,
            max_scores=self.max_scores,
        )
        self.supervisor.start("recorder", 1, lambda _name: make)


def start_run(
    settings: Settings,
    checked: Checked,
    *,
    note: Callable[[str], None],
    closing: ExitStack,
    engine: Engine | None = None,
) -> StartedRun:
    """Start the workers of a run. What is opened is closed by `closing`, also if the start fails half way."""
    import torch

    from actors.models.loading import fingerprint
    from learner.parallel.data_parallel import DataParallel
    from learner.parallel.group import LearnerGroup
    from learner.parallel.worker import LearnerWorker

    folder = checked.folder
    data = load_data(settings, checked.rows)
    describe_data(settings, checked.rows, data.prompts, note)
    now = StoredSettings(
        identity(settings, prompts=data.prompts.fingerprint(), weights=fingerprint(data.source)),
        asdict(settings),
        user_files(settings),
    )
    for line in folder.claim(now, resume=settings.run.resume):
        note(line)
    runtime = make_runtime(settings, folder.path.resolve())
    closing.callback(runtime.close)
    supervisor = Supervisor(runtime, timeouts=timeouts_of(settings), note=note)
    closing.callback(supervisor.close)
    pipeline = Pipeline(supervisor)
    reward_log = folder.reward_log.resolve()
    supervisor.start(
        "reward", settings.runtime.reward_workers, lambda _name: partial(make_reward, settings, reward_log)
    )
    plan: RunPlan | None = None
    makes_engine = engine is None
    if settings.runtime.name == "local":
        plan, engine = _plan_here(settings, data, engine, note)
    supervisor.start(
        "rollout",
        settings.runtime.rollout_workers,
        lambda name: partial(make_rollout, settings, name, engine, owns_engine=makes_engine),
    )
    size = settings.runtime.learner_data_parallel_size
    checkpoints, mark = folder.checkpoints.resolve(), folder.lock.read_text()
    handles: list[Handle[LearnerWorker]] = [
        runtime.start(
            "learner",
            partial(
                make_learner, settings, checkpoints, mark, ranks=DataParallel(rank, size), plan=plan, engine=engine
            ),
            name=f"learner-{rank}",
        )
        for rank in range(size)
    ]
    learners = LearnerGroup(runtime, handles, seconds=settings.runtime.learner_timeout_seconds)
    closing.callback(learners.close)
    learner_notes = learners.call(LearnerWorker.notes)
    for line in learner_notes:
        note(line)
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    plan_lines = [*(plan.lines() if plan else []), *learner_notes]
    write_started(folder, plan_lines, accelerator=accelerator)
    gc.freeze()  # no collection need look at long-lived objects of models and libraries again
    return StartedRun(
        settings=settings,
        folder=folder,
        supervisor=supervisor,
        pipeline=pipeline,
        learners=learners,
        prompts=data.prompts,
        demonstrations=data.demonstrations,
        base_model=data.source.path,
        identity=now.identity,
        reward_fingerprint=reward_fingerprint(settings, now.files),
        max_scores=checked.max_scores,
        samples_repeat=plan is not None and plan.engine.per_request_seeds and settings.runtime.max_staleness == 0,
        sleep_mode=plan is not None and plan.way.sleep_mode,
    )


def _plan_here(
    settings: Settings, data: RunData, engine: Engine | None, note: Callable[[str], None]
) -> tuple["RunPlan", Engine]:
    """The plan of a run in one process, and its engine."""
    from epiphany.run_plan import apply_limits, plan_run

    plan = plan_run(settings, data.source)
    apply_limits(plan)
    for line in plan.lines():
        note(line)
    return plan, engine or make_engine(plan, data.source, data.tokenizer)


def make_learner(
    settings: Settings,
    checkpoints: Path,
    mark: str,
    *,
    ranks: "DataParallel",
    plan: "RunPlan | None" = None,
    engine: Engine | None = None,
) -> "LearnerWorker":
    """A learner over the weights of `engine`, or over its own; alone or one of several `ranks`.

    Raises UsageError if the driver's `mark` in the run folder is not to be seen from here: checkpoints would be written
    to another disk, and a resumed run would not find them.
    """
    from epiphany.learner_factory import assemble_supervised_learner, make_learner_of_plan
    from epiphany.run_plan import apply_limits, plan_run
    from learner.parallel.worker import LearnerWorker

    lock = checkpoints.parent / "lock"
    if not lock.is_file() or lock.read_text() != mark:
        raise UsageError(
            f"run.folder={checkpoints.parent} is another place for the learner on {os.uname().nodename}: choose one "
            "that all machines share"
        )
    notes = []
    if plan is None:
        source, _ = load_model_source(settings)
        plan = plan_run(settings, source, roles=frozenset({"learner"}))
        apply_limits(plan)
        notes = [f"the learner is on {plan.device.kind} in {plan.device.dtype}", *plan.memory]
    learner, weights = make_learner_of_plan(settings, plan, engine=engine, rank=ranks.rank)
    way = plan.way
    return LearnerWorker(
        learner,
        make_supervised=lambda: assemble_supervised_learner(settings, learner.policy, way, sharded=learner.sharded),
        ranks=ranks,
        checkpoints=checkpoints,
        base_model=settings.model.path,
        keep=settings.run.keep_checkpoints,
        adapter_leaves_process=engine is None,
        notes=[*notes, f"the learner's base weights: {weights}"],
    )
