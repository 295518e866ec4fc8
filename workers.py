"""From settings to workers, in this process or in another: what a runtime calls to make one.

With `engine`, rollout and learner share it and its weights; without, each builds what it needs where it runs. Knows every
package but report.
"""

from pathlib import Path

from actors.build import build_engine, build_machine, build_model_source, choose_engine
from actors.engine import Engine
from actors.rollout import RolloutWorker
from conf.schema import Settings
from learner.build import Blueprint, build_learner, draw
from learner.worker import LearnerWorker


def make_rollout(settings: Settings, name: str, engine: Engine | None = None) -> RolloutWorker:
    """A rollout worker on `engine`, or on one of its own."""
    if engine is None:
        machine = build_machine(settings)
        source, tokenizer = build_model_source(settings)
        blueprint = draw(settings, machine, source, roles=frozenset({"rollout"}))
        kind, _ = choose_engine(blueprint.settings, machine)
        engine = build_engine(blueprint.settings, machine, kind, source, tokenizer, blueprint.layout)
    return RolloutWorker(engine, seed=settings.run.seed, name=name)


def make_learner(
    settings: Settings, folder: Path, blueprint: Blueprint | None = None, engine: Engine | None = None
) -> LearnerWorker:
    """A learner over the weights of `engine`, or over its own, with checkpoints in `folder`."""
    machine = build_machine(settings)
    source, _ = build_model_source(settings)
    notes = []
    if blueprint is None:
        blueprint = draw(settings, machine, source, roles=frozenset({"learner"}))
        notes = [f"the learner is on {machine.device} in {machine.dtype}", *blueprint.notes]
    learner, origin = build_learner(blueprint, machine, source, engine=engine)
    return LearnerWorker(
        learner, checkpoints=folder, base_model=settings.model.path, keep=settings.run.keep_checkpoints,
        on_host=engine is None, notes=[*notes, f"the learner's base weights: {origin}"],
    )  # fmt: skip
