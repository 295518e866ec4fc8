"""The arguments of the command line: abbreviations, which keys exist, and what they used to be called.

Knows the names of the settings; validate.py knows their values.
"""

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from conf.errors import UsageError
from conf.fields import walk
from conf.schema import GROUPS, Settings, SourceSettings, TermSettings

# Short for settings. The value of those in TEXTS is taken as it is, without Hydra's grammar.
SHORT = {
    "run": "run.folder",
    "prompt": "generate.prompt",
    "prompts": "generate.prompts",
    "format": "export.format",
    "to": "export.to",
}
TEXTS = ("generate.prompt",)
# Below these, keys are the user's own.
OPEN_SECTIONS = ("data.task", "data.held_out_task")
# The quickstart's settings suit only its own task, so they do not apply if one of these is chosen.
OWN_TASK = re.compile(
    r"data|data\.(held_out_)?source|data\.sources(\..*)?"
    r"|model|model\.(path|revision|chat_template)"
    r"|reward|reward\.(terms(\..*)?|system_prompt)"
)
# Old keys and their new names.
RENAMED = {
    "algorithm.beta": "algorithm.online_dpo.beta",
    "algorithm.clip_most": "algorithm.dual_clip",
    "algorithm.critic_warmup_steps": "algorithm.ppo.critic_warmup_steps",
    "algorithm.flat_groups": "algorithm.zero_variance_groups",
    "algorithm.gae_lambda": "algorithm.ppo.gae_lambda",
    "algorithm.gamma": "algorithm.ppo.gamma",
    "algorithm.importance_cap": "algorithm.importance_sampling_cap",
    "algorithm.importance_level": "algorithm.importance_sampling_level",
    "algorithm.importance_mode": "algorithm.importance_sampling_mode",
    "algorithm.kl_in": "algorithm.kl_placement",
    "algorithm.normalise_terms": "algorithm.normalize_terms",
    "algorithm.preference_loss": "algorithm.online_dpo.preference_loss",
    "algorithm.reward_scale": "algorithm.scale_rewards",
    "algorithm.token_weights": "algorithm.loss_aggregation",
    "algorithm.value_clip": "algorithm.ppo.value_clip",
    "algorithm.value_learning_rate": "algorithm.ppo.value_learning_rate",
    "engine.release_cache": "engine.sleep_mode",
    "learner.final_rate": "learner.min_lr_ratio",
    "reward.check_gold": "reward.check_reference_answer",
    "reward.quorum": "reward.min_scored_fraction",
    "runtime.learner_ranks": "runtime.learner_data_parallel_size",
    "runtime.learner_seconds": "runtime.learner_timeout_seconds",
    "runtime.max_losses": "runtime.max_worker_restarts",
    "runtime.stall_seconds": "runtime.worker_timeout_seconds",
    "runtime.start_seconds": "runtime.worker_start_timeout_seconds",
}
# By the key's new name: old values and their new names.
RENAMED_VALUES = {
    "algorithm.zero_variance_groups": {"drop": "filter"},
    "algorithm.loss_aggregation": {
        "sequence": "sequence_mean",
        "token": "token_mean",
        "constant": "constant_length",
        "whole": "sequence_sum",
    },
}
# Settings that are lists of sections: what an entry is called, and its class.
LISTS = {"reward.terms": ("term", TermSettings), "data.sources": ("source", SourceSettings)}
# What normalize_overrides adds.
IMPLIED = ("experiment=none", "data=file")
LONGEST_FOLDER_NAME = 120


def wants_version(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for Epiphany's version."""
    return "--version" in arguments


def normalize_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra needs them: overrides first, for its parser cannot resume them after an option.

    `run=X` becomes `run.folder=X`. Keys in open sections get `++`, which allows new ones. A source without a preset
    gets `data=file`, so that no option of the default preset applies to it. A task other than the quickstart's gets
    `experiment=none`.
    """
    overrides = [_in_full(argument) for argument in arguments if _is_override(argument)]
    options = [argument for argument in arguments if not _is_override(argument)]
    return [*_implied(overrides), *map(_normalized, overrides), *options]


def check_overrides(arguments: Sequence[str]) -> None:
    """Raises UsageError for an override of a key that does not exist, with its new name or the nearest one."""
    try:
        overrides = OverridesParser.create().parse_overrides([_in_full(a) for a in arguments if _is_override(a)])
    except HydraException:
        return  # Hydra's own message explains its grammar.
    settings = _known_keys()
    for override in overrides:
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")):
            continue
        _check_renamed(override)
        is_open = key.startswith(tuple(f"{section}." for section in OPEN_SECTIONS))
        if not (key in settings or key in GROUPS or is_open or _is_entry_key(key)):
            raise UsageError(f"there is no setting {key}{_hint(key, settings)}")
        if override.package is not None:
            raise UsageError(
                f"{key}@{override.package}: presets cannot be moved to another section; use {key}=<preset>"
            )
        _check_entries(override)


def sweep_folder(folder: str, overrides: Sequence[str]) -> str:
    """The folder of one job of a sweep: below `folder`, named by the job's overrides and not by its number.

    The order of the overrides does not matter. Characters other than letters, digits, '.', '_' and '-' are replaced,
    and long names are cut; a digest then keeps the names apart. What the overrides imply is not part of the name.
    """
    chosen = [override for override in overrides if override not in IMPLIED]
    implied = _implied(chosen)
    last = {_key(override): override.partition("=")[2] for override in overrides if override not in implied}
    values = {key: last[key] for key in sorted(last) if key not in ("run", "run.folder", "run.name", "run.resume")}
    name = "__".join(f"{key}-{value}" for key, value in values.items()) or "defaults"
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    if safe != name or "__" in "".join(values.values()) or len(name) > LONGEST_FOLDER_NAME:
        digest = hashlib.sha256(repr(values).encode()).hexdigest()[:8]
        safe = f"{safe[: LONGEST_FOLDER_NAME - 9]}-{digest}"
    return f"{folder}/{safe}"


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def _implied(overrides: Sequence[str]) -> list[str]:
    """The presets that the overrides imply and do not name."""
    keys = {_key(override) for override in overrides}
    has_task, has_source = any(map(OWN_TASK.fullmatch, keys)), bool(keys & {"data.source", "data.sources"})
    needed = ("experiment" not in keys and has_task, "data" not in keys and has_source)
    return [preset for preset, is_needed in zip(IMPLIED, needed, strict=True) if is_needed]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _in_full(argument: str) -> str:
    """The argument with the whole name of its setting."""
    key, _, value = argument.partition("=")
    key = SHORT.get(key, key)
    if key in TEXTS:
        # ${ is a reference for OmegaConf, ' an end for Hydra; backslashes count before these only.
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        value = "'" + re.sub(r"(\\*)('|\Z)", lambda at: at[1] * 2 + at[2].replace("'", "\\'"), value) + "'"
    return f"{key}={value}" if "=" in argument else argument


def _normalized(argument: str) -> str:
    key = argument.partition("=")[0]
    if key in OPEN_SECTIONS or key.startswith(tuple(f"{section}." for section in OPEN_SECTIONS)):
        return f"++{argument}"
    return argument


def _known_keys() -> list[str]:
    """Every setting and every section, sections first."""
    keys = [setting.key for setting in walk(Settings())]
    sections = dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key)
    return [*sections, *keys]


def _is_entry_key(key: str) -> bool:
    """Whether the key names a field of an entry of a list, as `reward.terms.0.weight`."""
    match = re.fullmatch(r"(\w+\.\w+)\.\d+(\.(\w+)(\..+)?)?", key)
    if match is None or match[1] not in LISTS:
        return False
    known = _fields_of(match[1])
    return match[3] is None or (match[3] in known and (match[4] is None or match[3] in ("options", "task")))


def _fields_of(name: str) -> list[str]:
    """The fields of an entry of one of LISTS."""
    return [declared.name for declared in fields(LISTS[name][1])]


def _check_renamed(override: Override) -> None:
    key = RENAMED.get(override.key_or_group, override.key_or_group)
    old_values = RENAMED_VALUES.get(key, {})
    for value in _values(override):
        if isinstance(value, str) and value in old_values:
            raise UsageError(f"{override.key_or_group}={value} is now {key}={old_values[value]}")
    if key != override.key_or_group:
        raise UsageError(f"{override.key_or_group} is now {key}")


def _check_entries(override: Override) -> None:
    """Whether reward.terms=[...] or data.sources=[...] lists entries with known fields."""
    key = override.key_or_group
    if key not in LISTS:
        return
    (what, _), known = LISTS[key], _fields_of(key)
    for entries in _values(override):
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict):
                raise UsageError(f"{key}: write {{{known[0]}: {entry}}} in place of {entry}, in a list")
            for name in map(str, entry):
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"; did you mean {near[0]}?" if near else f", only {', '.join(known)}"
                    raise UsageError(f"{key}: a {what} has no {name}{hint}")


def _values(override: Override) -> Iterator[object]:
    """The value, or each of those of a sweep."""
    value = override.value()
    for element in value.list if isinstance(value, ChoiceSweep) else [value]:
        yield str(element) if not isinstance(element, (list, dict)) else element


def _hint(key: str, settings: Sequence[str]) -> str:
    """The nearest setting, or all settings of the section that the key names."""
    section, _, name = key.rpartition(".")

    def similarity(candidate: str) -> float:
        pairs = ((key, candidate), (name, candidate.rpartition(".")[2]))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs) / 2

    nearest = max([*settings, *GROUPS], key=similarity)
    if similarity(nearest) > 0.6:
        return f"; did you mean {nearest}?"
    siblings = [setting for setting in settings if section and setting.rpartition(".")[0] == section]
    return f", only {', '.join(siblings)}" if siblings else "; python -m conf.reference lists all settings"
