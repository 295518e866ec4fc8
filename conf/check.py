"""Settings that cannot work, found before anything loads. Knows only the settings."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf.errors import UsageError
from conf.schema import GROUPS, Settings, TermSettings

NAMES = {
    "algorithm.name": ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo", "online_dpo"),
    "algorithm.reward_scale": (None, "group", "batch", "none"),
    "algorithm.flat_groups": ("keep", "drop", "resample"),
    "algorithm.token_weights": (None, "sequence", "token", "constant", "whole"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "algorithm.kl_in": ("loss", "reward"),
    "algorithm.importance_level": ("token", "sequence"),
    "algorithm.importance_mode": ("truncate", "mask"),
    "algorithm.preference_loss": ("sigmoid", "ipo", "hinge"),
    "engine.name": ("auto", "vllm", "transformers"),
    "engine.share_weights": ("auto", "always", "never"),
    "engine.kv_cache_dtype": ("auto", "fp8"),
    "hardware.device": ("auto", "cpu", "cuda"),
    "learner.optimizer": ("adamw", "adamw8bit"),
    "learner.schedule": ("constant", "linear", "cosine"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.quantization": ("none", "nf4"),
    "runtime.name": ("local", "ray"),
    "task": ("train", "status"),
}
# Each key with the least value that makes sense; null leaves the choice to the memory plan.
LEAST: dict[str, float] = {
    "algorithm.prompts_per_step": 1, "algorithm.group_size": 2, "data.held_out": 1, "data.max_prompt_tokens": 1,
    "data.max_bad_rows": 0, "sampling.max_tokens": 1, "engine.max_num_seqs": 1, "engine.max_num_batched_tokens": 1,
    "engine.tensor_parallel_size": 1, "hardware.vram_gib": 1, "evaluation.every": 0,
    "evaluation.samples": 0, "learner.micro_batch_tokens": 1, "learner.logit_chunk_tokens": 1, "learner.warmup_steps": 0,
    "learner.weight_decay": 0, "model.lora.rank": 1, "runtime.reward_workers": 1, "runtime.rollout_workers": 1, "runtime.learner_ranks": 1, "run.steps": 1, "run.checkpoint_every": 1,
    "run.keep_checkpoints": 1, "runtime.max_staleness": 0, "algorithm.kl_coefficient": 0,
    "algorithm.epochs": 1, "algorithm.minibatches": 1, "algorithm.max_resampled": 0, "algorithm.overlong_buffer": 0,
    "algorithm.clip_low": 0, "algorithm.clip_high": 0, "algorithm.entropy_coefficient": 0, "algorithm.critic_warmup_steps": 0,
    "algorithm.gamma": 0, "algorithm.gae_lambda": 0, "learner.final_rate": 0,
}  # fmt: skip
POSITIVE = ("runtime.start_seconds", "runtime.stall_seconds", "runtime.learner_seconds", "learner.learning_rate", "sampling.temperature", "reward.deadline_seconds", "reward.memory_gib",
            "learner.max_grad_norm", "model.lora.alpha", "algorithm.beta", "algorithm.value_learning_rate")  # fmt: skip
# Null, or over 0.
POSITIVE_OR_NULL = ("algorithm.importance_cap", "algorithm.kl_target", "algorithm.clip_most", "algorithm.value_clip")
# Each with the most that makes sense.
MOST = {"algorithm.gamma": 1, "algorithm.gae_lambda": 1, "algorithm.overlong_buffer": 1, "learner.final_rate": 1}


def check_settings(settings: Settings) -> None:
    """Raises UsageError naming every setting that cannot work."""
    wrong = []
    for key, names in NAMES.items():
        if (value := _get(settings, key)) not in names:
            wrong.append(f"{key}={value}: choose {', '.join('null' if name is None else name for name in names)}")
    for key, least in LEAST.items():
        if (value := _get(settings, key)) is not None and value < least:
            wrong.append(f"{key}={value}: must be at least {least:g}")
    for key, most in MOST.items():
        if (value := _get(settings, key)) > most:
            wrong.append(f"{key}={value}: must be at most {most:g}")
    positive = [*POSITIVE, *(key for key in POSITIVE_OR_NULL if _get(settings, key) is not None)]
    wrong += [f"{key}={_get(settings, key)}: must be over 0" for key in positive if not _get(settings, key) > 0]
    if settings.algorithm.group_size < 2:
        wrong.append("a group of 1 has no advantage: the completions of one prompt are compared with each other")
    wrong += _wrong_algorithm(settings)
    if not settings.reward.terms:
        wrong.append("reward.terms is empty: name at least one, for instance reward=numeric")
    names = Counter(term.name for term in settings.reward.terms if term.name is not None)
    wrong += [f"reward.terms: {count} terms are named {name!r}" for name, count in names.items() if count > 1]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", settings.run.name):
        wrong.append(
            f"run.name={settings.run.name}: letters, digits, '.', '_' and '-' only, for it becomes a folder's name; "
            "run.folder takes a path"
        )
    if not 0 < settings.reward.quorum <= 1:
        wrong.append(f"reward.quorum={settings.reward.quorum}: must be over 0 and at most 1")
    if settings.runtime.name == "local":
        wrong += [
            f"runtime.{name}: one process has one; choose runtime=ray"
            for name in ("rollout_workers", "learner_ranks")
            if getattr(settings.runtime, name) > 1
        ]
    wrong += _wrong_gpus(settings)
    if settings.run.resume not in ("auto", "never") and not settings.run.resume.isdigit():
        wrong.append(f"run.resume={settings.run.resume}: choose auto, never or a step's number")
    if settings.engine.release_cache and settings.runtime.name == "ray":
        wrong.append("engine.release_cache=true: with runtime=ray the learner has memory of its own")
    if settings.engine.release_cache and settings.runtime.max_staleness:
        wrong.append(
            "engine.release_cache=true: with runtime.max_staleness over 0 the engine works while the learner does"
        )
    if wrong:
        raise UsageError("\n".join(wrong))


def _wrong_algorithm(settings: Settings) -> list[str]:
    """Settings of the algorithm that would do nothing, or that no algorithm here has."""
    a, wrong = settings.algorithm, []
    in_groups = a.name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
    if a.minibatches > a.prompts_per_step:
        wrong.append(f"algorithm.minibatches={a.minibatches}: a batch has {a.prompts_per_step} prompts to share out")
    if not in_groups:
        for key in ("reward_scale", "normalise_terms"):
            if getattr(a, key):
                wrong.append(f"algorithm.{key}: {a.name} does not normalise rewards in groups")
    if a.normalise_terms and (a.reward_scale or a.overlong_buffer or (a.kl_coefficient and a.kl_in == "reward")):
        wrong.append(
            "algorithm.normalise_terms=true normalises the reward's terms alone: without reward_scale, overlong_buffer and "
            "kl_in=reward (reward.terms has length, kl_in=loss does the same)"
        )
    if a.kl_target is not None and not a.kl_coefficient:
        wrong.append("algorithm.kl_target: kl_coefficient must be over 0 to have something to adapt")
    if a.kl_coefficient and a.kl_in == "loss" and a.kl_estimator == "k1":
        wrong.append("algorithm.kl_estimator=k1 has no gradient as a loss: choose kl_in=reward, or k2 or k3")
    if a.name == "online_dpo":
        for key in ("kl_coefficient", "overlong_buffer", "token_weights"):
            if getattr(a, key):
                wrong.append(f"algorithm.{key}: online_dpo has pairs (algorithm.beta holds it to the reference)")
    if settings.model.lora.dora:
        wrong.append(
            "model.lora.dora=true: neither vLLM nor the engine here serves DoRA; model.lora.rslora=true is served"
        )
    return wrong


def _wrong_gpus(settings: Settings) -> list[str]:
    r, size, wrong = settings.runtime, settings.engine.tensor_parallel_size, []
    if size > 1:
        if r.name == "local":
            wrong.append(f"engine.tensor_parallel_size={size}: an engine over several GPUs needs runtime=ray")
        if settings.engine.name == "transformers":
            wrong.append(f"engine.tensor_parallel_size={size}: only vLLM spreads a model over GPUs")
        if settings.model.quantization != "none":
            wrong.append(f"engine.tensor_parallel_size={size}: only 16-bit weights, model.quantization=none")
    for name, least in (("rollout_gpus", size), ("learner_gpus", 1)):
        n = getattr(r, name)
        if n is not None and n != 0 and (n < 0 or (n != least and (n > 1 or least > 1))):
            wrong.append(
                f"runtime.{name}={n:g}: choose null, {least}" + (" or a share of one, as 0.5" if least == 1 else "")
            )
    return wrong


# Below these, keys are the user's own.
FREE = ("data.task", "data.held_out_task")


def spell_out(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra wants them: run.folder=X for run=X, and ++ before keys that the schema leaves open, so that new
    ones can be given."""
    long = [f"run.folder={a.removeprefix('run=')}" if a.startswith("run=") else a for a in arguments]
    return ["++" + a if a.split("=")[0].startswith(tuple(f"{key}." for key in FREE)) else a for a in long]


def check_overrides(arguments: Sequence[str]) -> None:
    """Raises UsageError for an override of a key that does not exist, with the nearest one that does."""
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return  # Hydra says better what is wrong with the grammar
    known = list(_keys(Settings()))
    for override in overrides:
        key = override.key_or_group
        free = any(key.startswith(f"{parent}.") for parent in (*FREE, "reward.terms"))
        if override.is_delete() or override.is_add() or "/" in key or "@" in key or key.split(".")[0] == "hydra":
            continue
        if key not in known and key not in GROUPS and not free:
            near = difflib.get_close_matches(key, [*known, *GROUPS], n=1, cutoff=0.5)
            leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], n=1)
            guess = near or [k for k in known if leaf and k.rsplit(".", 1)[-1] == leaf[0]][:1]
            hint = f"; did you mean {guess[0]}?" if guess else "; python launch.py --cfg job lists them all"
            raise UsageError(f"there is no setting {key}{hint}")


def _keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in fields(node):
        keys.append(prefix + f.name)
        value = getattr(node, f.name)
        if is_dataclass(value):
            keys += _keys(value, f"{prefix}{f.name}.")
    return keys


def _get(settings: Settings, key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def named_terms(terms: Sequence[TermSettings]) -> list[TermSettings]:
    """The terms, each with a name of its own: the one given, else its function's, numbered where that is taken."""
    taken = {term.name for term in terms if term.name is not None}
    named = []
    for term in terms:
        if term.name is None:
            function = term.fn.rpartition(":")[2]
            numbered = (f"{function}_{i}" for i in itertools.count(2))
            name = next(n for n in itertools.chain([function], numbered) if n not in taken)
            taken.add(name)
            term = replace(term, name=name)
        named.append(term)
    return named
