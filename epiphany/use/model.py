"""A model in use: one engine with the base weights and an adapter on them, and nothing of training."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from actors.engines.base import Engine
from actors.models.source import ModelSource
from actors.types import Adapter, Sampling
from conf.schema import Settings
from epiphany.adapters import no_adapter, stored_adapter
from epiphany.run_plan import apply_limits, plan_run
from epiphany.sampling import evaluation_sampling
from epiphany.sampling_workers import make_engine

FEW = 8  # requests for which the engine is no larger than they are


@dataclass
class ModelInUse:
    """An engine, which samples from the base model, and the two adapters that it can load: the one in use, if there is
    one, and `nothing`, which leaves the base model as it is.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None
    nothing: Adapter


@dataclass(frozen=True)
class Load:
    """What an engine is sized for: `requests` at a time, each a prompt and an answer of so many tokens at most."""

    requests: int
    prompt_tokens: int
    max_tokens: int


def describe(settings: Settings) -> str:
    """The model in use, for the user."""
    if settings.model.adapter is None:
        return f"{settings.model.path}, without an adapter"
    return f"{settings.model.path} with the adapter in {settings.model.adapter}"


def open_model(
    settings: Settings,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    load: Load,
    *,
    note: Callable[[str], None],
    closing: ExitStack,
) -> ModelInUse:
    """Start an engine for `load` with model.adapter in it, if that is named. Raises UsageError for what cannot run."""
    plan = plan_run(sized(settings, load), source, roles=frozenset({"rollout"}))
    apply_limits(plan)
    note(f"starting {plan.engine_name} on {plan.device.kind} in {plan.device.dtype} ...")
    engine = make_engine(plan, source, tokenizer)
    closing.callback(engine.close)
    adapter = stored_adapter(settings, plan.layout)
    if adapter is not None:
        engine.load_adapter(adapter)
    return ModelInUse(engine, tokenizer, adapter, no_adapter(plan.layout))


def answer_sampling(settings: Settings, *, temperature: float, max_tokens: int | None) -> Sampling:
    """How answers are drawn: as in evaluation, but for what the task sets apart."""
    sampling = evaluation_sampling(settings)
    return replace(
        sampling, temperature=temperature, max_tokens=sampling.max_tokens if max_tokens is None else max_tokens
    )


def sized(settings: Settings, load: Load) -> Settings:
    """The settings of an engine for this load, which may be longer, and is often smaller, than that of training."""
    asked = settings.engine.max_num_seqs
    few = load.requests if load.requests <= FEW else None
    return replace(
        settings,
        data=replace(settings.data, max_prompt_tokens=load.prompt_tokens),
        sampling=replace(settings.sampling, max_tokens=load.max_tokens),
        algorithm=replace(settings.algorithm, prompts_per_step=load.requests, group_size=1),
        engine=replace(settings.engine, max_num_seqs=few if asked is None else asked, sleep_mode=None),
    )
