"""Settings that cannot work are refused before anything loads.

The rule of a single setting stands at its field (conf/fields.py); the rules here involve several settings. Knows only
the settings, and imports nothing heavy.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from conf.errors import UsageError
from conf.facts import ALGORITHMS, USING_A_MODEL, readers
from conf.fields import Setting, walk
from conf.schema import (
    AlgorithmSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TermSettings,
    WarmupSettings,
)
from conf.sources import named_sources


def check_settings(settings: Settings) -> None:
    """Raises UsageError with one line for each setting that cannot work."""
    problems = [
        *itertools.chain.from_iterable(_field_problems(setting) for setting in walk(settings)),
        *_algorithm_problems(settings.algorithm),
        *_model_problems(settings.model),
        *_adapter_problems(settings),
        *_data_problems(settings.data),
        *_reward_problems(settings),
        *_stop_problems(settings),
        *_unread_evaluation(settings),
        *_unread_warmup(settings),
        *_runtime_problems(settings),
        *_gpu_problems(settings),
        *_run_problems(settings.run),
    ]
    if problems:
        raise UsageError("\n".join(problems))


def named_terms(terms: Sequence[TermSettings]) -> list[TermSettings]:
    """The terms, each with a unique name: its own, else that of its function, numbered if it is taken."""
    taken = {term.name for term in terms if term.name is not None}
    named = []
    for term in terms:
        if term.name is None:
            function = term.fn.rpartition(":")[2]
            numbered = (f"{function}_{i}" for i in itertools.count(2))
            name = next(candidate for candidate in itertools.chain([function], numbered) if candidate not in taken)
            taken.add(name)
            term = replace(term, name=name)
        named.append(term)
    return named


def _field_problems(setting: Setting) -> Iterator[str]:
    """Whether the value breaks the rule at its field."""
    rule, value = setting.rule, setting.value
    if value is None:
        return
    if rule.choices:
        allowed = ", ".join((*["null"] * setting.nullable, *rule.choices, *["module:name"] * rule.extensible))
        for choice in value if isinstance(value, list) else [value]:
            if choice not in rule.choices and not (rule.extensible and ":" in str(choice)):
                yield f"{setting.key}={choice}: choose {allowed}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if value != value:
        yield f"{setting.key}={value}: must be a number"
    elif rule.minimum is not None and value < rule.minimum:
        yield f"{setting.key}={value}: must be at least {rule.minimum:g}"
    elif rule.maximum is not None and value > rule.maximum:
        yield f"{setting.key}={value}: must be at most {rule.maximum:g}"
    elif rule.above is not None and value <= rule.above:
        yield f"{setting.key}={value}: must be over {rule.above:g}"
    elif rule.below is not None and value >= rule.below:
        yield f"{setting.key}={value}: must be under {rule.below:g}"


def _algorithm_problems(algorithm: AlgorithmSettings) -> Iterator[str]:
    if algorithm.name == "sft":
        yield "algorithm.name=sft: supervised fine-tuning comes before the run, with warmup.steps"
    yield from _unread_settings(algorithm)
    if algorithm.minibatches > algorithm.prompts_per_step:
        yield (
            f"algorithm.minibatches={algorithm.minibatches}: must be at most "
            f"algorithm.prompts_per_step={algorithm.prompts_per_step}"
        )
    kl_in_reward = algorithm.kl_coefficient and algorithm.kl_placement == "reward"
    if algorithm.normalize_terms and (algorithm.scale_rewards or algorithm.overlong_buffer or kl_in_reward):
        yield (
            "algorithm.normalize_terms=true cannot be combined with scale_rewards, overlong_buffer or "
            "kl_placement=reward; use a length term in reward.terms, and kl_placement=loss"
        )
    if algorithm.kl_target is not None and not algorithm.kl_coefficient:
        yield "algorithm.kl_target: set algorithm.kl_coefficient over 0; it is what the target adapts"
    if algorithm.kl_coefficient and algorithm.kl_placement == "loss" and algorithm.kl_estimator == "k1":
        yield "algorithm.kl_estimator=k1 has no gradient in the loss: choose kl_placement=reward, or k2 or k3"


def _unread_settings(algorithm: AlgorithmSettings) -> Iterator[str]:
    """Settings that were changed from their defaults and that the chosen algorithm does not read."""
    facts = ALGORITHMS.get(algorithm.name)
    if facts is None:  # an algorithm of the user's own
        return
    for changed, default in zip(walk(algorithm), walk(AlgorithmSettings()), strict=True):
        algorithms = readers(changed.key.split(".")[0])
        if changed.value == default.value or algorithm.name in algorithms:
            continue
        problem = f"algorithm.{changed.key}={changed.value}: {algorithm.name} does not read this setting"
        if facts.has_pairs and changed.key.startswith("kl_"):
            yield f"{problem}; algorithm.online_dpo.beta keeps the policy near the base model"
        else:
            yield f"{problem}, only {', '.join(algorithms)}"
    if facts.has_pairs and algorithm.zero_variance_groups == "filter":
        yield f"algorithm.zero_variance_groups=filter: {algorithm.name} skips them anyway; choose keep or resample"
    if algorithm.max_resampled != AlgorithmSettings().max_resampled and algorithm.zero_variance_groups != "resample":
        yield "algorithm.max_resampled: only algorithm.zero_variance_groups=resample reads it"


def _model_problems(model: ModelSettings) -> Iterator[str]:
    if model.package is not None and model.package_path is None:
        yield f"model.package={model.package}: name the model whose weights it holds in model.package_path"
    if model.lora.dora:
        yield "model.lora.dora=true: no engine here serves DoRA; model.lora.rslora=true is supported"


def _adapter_problems(settings: Settings) -> Iterator[str]:
    """What training cannot do if it starts from an adapter."""
    if settings.model.adapter is None or settings.task in USING_A_MODEL:
        return
    for changed, default in zip(walk(settings.model.lora), walk(LoraSettings()), strict=True):
        if changed.value != default.value:
            yield f"model.lora.{changed.key}={changed.value}: the adapter in model.adapter has its own"
    facts = ALGORITHMS.get(settings.algorithm.name)
    if settings.algorithm.kl_coefficient or (facts is not None and facts.has_pairs):
        yield (
            "model.adapter: the reference policy is the base model, not the one that training starts from; set "
            "algorithm.kl_coefficient=0 and an algorithm without a reference"
        )


def _data_problems(data: DataSettings) -> Iterator[str]:
    if not data.source and not data.sources:
        yield "data.source: name a file, a Hugging Face dataset or reasoning_gym:<task>, as data.source=rows.jsonl"
    if data.sources:
        if data.source:
            yield f"data.sources stands in place of data.source={data.source}: use data=file, or leave one of them out"
        if data.held_out_source is not None:
            yield "data.held_out_source: each of data.sources holds out questions of its own; leave it out"
        names = Counter(source.name for source in named_sources(data))
        for name, count in names.items():
            if count > 1:
                yield f"data.sources: {count} sources are named {name!r}; give each a name of its own"
    if (bounds := data.difficulty) is not None and not (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1):
        yield f"data.difficulty={bounds}: give the lowest and the highest pass rate, as [0.1, 0.9]"


def _reward_problems(settings: Settings) -> Iterator[str]:
    terms = settings.reward.terms
    if not terms:
        yield "reward.terms is empty: name at least one term, for instance with reward=numeric"
    names = Counter(term.name for term in terms if term.name is not None)
    yield from (f"reward.terms: {count} terms are named {name!r}" for name, count in names.items() if count > 1)
    sources = [str(source.name) for source in named_sources(settings.data)]
    for term in terms:
        for unknown in set(term.sources) - set(sources):
            yield f"reward.terms: {term.fn} names the source {unknown!r}; there are {', '.join(sources)}"
        if term.max_score is not None and ":" not in term.fn:
            yield f"reward.terms: max_score is for functions of your own; that of {term.fn} is known"
    for source in sources:
        if terms and not any(source in term.sources or not term.sources for term in terms):
            yield f"reward.terms: no term scores the answers of {source}"


def _unread_warmup(settings: Settings) -> Iterator[str]:
    """Settings of a warm-up that does not take place."""
    if settings.warmup.steps:
        return
    for changed, default in zip(walk(settings.warmup), walk(WarmupSettings()), strict=True):
        if changed.value != default.value:
            yield f"warmup.{changed.key}={changed.value}: nothing reads this unless warmup.steps is over 0"


def _stop_problems(settings: Settings) -> Iterator[str]:
    for key, texts in (("sampling.stop", settings.sampling.stop), ("evaluation.stop", settings.evaluation.stop)):
        if texts is not None and "" in texts:
            yield f"{key} holds an empty text, which would end every answer at once"


def _unread_evaluation(settings: Settings) -> Iterator[str]:
    if settings.evaluation.source is not None and settings.task not in USING_A_MODEL:
        yield "evaluation.source: only task=evaluate reads it; data.held_out_source is for a run"


def _runtime_problems(settings: Settings) -> Iterator[str]:
    runtime, engine, learner = settings.runtime, settings.engine, settings.learner
    if runtime.name == "local":
        for name in ("rollout_workers", "learner_data_parallel_size"):
            if getattr(runtime, name) > 1:
                yield f"runtime.{name}: more than 1 needs runtime=ray"
    if runtime.learner_data_parallel_size % runtime.learner_shards:
        size = f"runtime.learner_data_parallel_size={runtime.learner_data_parallel_size}"
        yield f"runtime.learner_shards={runtime.learner_shards} does not divide {size}: every part needs a learner"
    if learner.offload_activations and learner.gradient_checkpointing is False:
        yield "learner.offload_activations=true moves checkpoints: leave out learner.gradient_checkpointing=false"
    if runtime.learner_shards > 1 and learner.gradient_checkpointing is False:
        yield "learner.gradient_checkpointing=false: learner_shards needs layers to be computed again"
    if engine.sleep_mode and runtime.name == "ray":
        yield "engine.sleep_mode=true: with runtime=ray the learner does not share the engine's memory; leave it out"
    if engine.sleep_mode and runtime.max_staleness:
        yield "engine.sleep_mode=true: needs runtime.max_staleness=0, for the engine cannot sample while it sleeps"


def _gpu_problems(settings: Settings) -> Iterator[str]:
    runtime, size = settings.runtime, settings.engine.tensor_parallel_size
    if size > 1:
        if runtime.name == "local":
            yield f"engine.tensor_parallel_size={size}: an engine over several GPUs needs runtime=ray"
        if settings.engine.name == "transformers":
            yield f"engine.tensor_parallel_size={size}: only engine.name=vllm can use several GPUs"
        if settings.model.quantization != "none":
            yield f"engine.tensor_parallel_size={size}: needs 16-bit weights, model.quantization=none"
    for name, gpus, needed in (
        ("rollout_gpus", runtime.rollout_gpus, size),
        ("learner_gpus", runtime.learner_gpus, 1),
    ):
        is_share = needed == 1 and gpus is not None and gpus < 1
        if gpus is not None and gpus not in (0, needed) and not is_share:
            share = " or a part of one, such as 0.5" if needed == 1 else ""
            yield f"runtime.{name}={gpus:g}: choose null, {needed}{share}"


def _run_problems(run: RunSettings) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name):
        yield (
            f"run.name={run.name}: use letters, digits, '.', '_' and '-' only, because a folder gets this name; "
            "run.folder takes any path"
        )
    if run.resume not in ("auto", "never") and not run.resume.isdigit():
        yield f"run.resume={run.resume}: choose auto, never or the number of a step"
