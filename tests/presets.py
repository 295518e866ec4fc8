"""Objectives as a run would have them."""

from dataclasses import replace
from functools import cache
from typing import Any

from benchmarks.common import settings_from
from conf.schema import AlgorithmSettings
from learner.objectives import OBJECTIVES, Objective


@cache
def preset(name: str) -> AlgorithmSettings:
    """The settings of conf/algorithm/<name>.yaml."""
    return settings_from(f"algorithm={name}").algorithm


def objective(name: str = "grpo", *, max_tokens: int = 16, **changed: Any) -> Objective:
    """With the preset's settings, but for those that are `changed`."""
    return OBJECTIVES[name](replace(preset(name), **changed), max_tokens=max_tokens, term_weights={})
