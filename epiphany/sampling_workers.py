"""Workers that sample from a model and score what they sampled, with an engine of a plan. Knows no learner."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from actors.engines.base import Engine
from actors.pipeline import Pipeline
from actors.rollout import RolloutWorker
from actors.runtime.supervisor import Supervisor
from actors.types import Group, Prompt, Sampling
from conf.schema import Settings
from epiphany.placement import make_runtime, timeouts_of
from epiphany.reward_check import make_reward
from epiphany.run_data import load_model_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actors.models.source import ModelSource
    from epiphany.run_plan import RunPlan

COMPLETIONS = 2048  # sampled at a time


def start_sampling(settings: Settings, folder: Path, note: Callable[[str], None], closing: ExitStack) -> Pipeline:
    """Start workers that sample and score: from the base model, until an adapter is broadcast to them."""
    runtime = make_runtime(settings, folder.resolve(), learners=False)
    closing.callback(runtime.close)
    supervisor = Supervisor(runtime, timeouts=timeouts_of(settings), note=note)
    closing.callback(supervisor.close)
    pipeline = Pipeline(supervisor)
    workers = settings.runtime
    supervisor.start("reward", workers.reward_workers, lambda _name: partial(make_reward, settings, None))
    supervisor.start("rollout", workers.rollout_workers, lambda name: partial(make_rollout, settings, name))
    return pipeline


def scored_in_parts(
    pipeline: Pipeline, prompts: Sequence[Prompt], sampling: Sampling, samples: int, *, stop: Callable[[], bool]
) -> Iterator[list[Group] | None]:
    """The scored groups of `samples` completions each, about COMPLETIONS at a time, so that they can be kept as they
    come; None and nothing more once `stop` asks for the end.
    """
    size = max(1, COMPLETIONS // samples)
    for start in range(0, len(prompts), size):
        groups = pipeline.evaluate(prompts[start : start + size], sampling, samples, stop=stop)
        yield groups
        if groups is None:
            return


def make_rollout(
    settings: Settings, name: str, engine: Engine | None = None, *, owns_engine: bool = True
) -> RolloutWorker:
    """A rollout worker on `engine`, or on one that is made here. It closes the engine if it owns it."""
    if engine is None:
        from epiphany.run_plan import apply_limits, plan_run

        source, tokenizer = load_model_source(settings)
        plan = plan_run(settings, source, roles=frozenset({"rollout"}))
        apply_limits(plan)
        engine = make_engine(plan, source, tokenizer)
    return RolloutWorker(engine, seed=settings.run.seed, name=name, owns_engine=owns_engine)


def make_engine(plan: "RunPlan", source: "ModelSource", tokenizer: "PreTrainedTokenizerBase") -> Engine:
    """The engine of a plan, which loads the base weights."""
    from actors.engines.registry import ENGINES
    from actors.models.tokenizer import end_of_sequence_ids

    build = ENGINES[plan.engine_name].build
    return build(plan.engine, tokenizer, layout=plan.layout, eos_token_ids=end_of_sequence_ids(source, tokenizer))
