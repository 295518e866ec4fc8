"""Algorithms as a run would have them, or with the schema's defaults."""

from dataclasses import fields, replace
from functools import cache

from conf.compose import load_settings
from conf.schema import AlgorithmSettings, OnlineDPOSettings, PPOSettings
from learner.algorithms.base import Algorithm
from learner.algorithms.table import make_algorithm

SECTIONS = {"ppo": PPOSettings, "online_dpo": OnlineDPOSettings}


@cache
def preset(name: str) -> AlgorithmSettings:
    """The settings of conf/algorithm/<name>.yaml."""
    return load_settings(f"algorithm={name}").algorithm


def changed_settings(settings: AlgorithmSettings, **changed: object) -> AlgorithmSettings:
    """The settings with those that are `changed`, each by its own name, whether it is in a section or not."""
    for section, section_type in SECTIONS.items():
        names = {declared.name for declared in fields(section_type)} & changed.keys()
        values = {name: changed.pop(name) for name in names}
        settings = replace(settings, **{section: replace(getattr(settings, section), **values)})
    return replace(settings, **changed)  # type: ignore[arg-type]


def algorithm(name: str = "grpo", *, max_tokens: int = 16, **changed: object) -> Algorithm:
    """The algorithm with its preset's settings, but for those that are `changed`."""
    return make_algorithm(changed_settings(preset(name), **changed), max_tokens=max_tokens, term_weights={})


def default_algorithm(name: str, *, max_tokens: int = 16, **changed: object) -> Algorithm:
    """The algorithm with the defaults of the schema, but for the settings that are `changed`."""
    settings = changed_settings(AlgorithmSettings(name=name), **changed)
    return make_algorithm(settings, max_tokens=max_tokens, term_weights={})
