"""Reward functions by name, the import of a user's own, and their weighted sum. Plain Python."""

import asyncio
import importlib
import importlib.util
import inspect
import math as mathematics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import UsageError
from rewards import answers, style
from rewards.sample import RewardFn, Sample


class RewardError(UsageError):
    """A reward that cannot be found, imported or called; the message says what to change."""


@dataclass(frozen=True)
class Term:
    """One term of the sum, with a name of its own. `checks_answer`: it distinguishes strict and lenient correctness."""

    name: str
    registered: bool
    fn: RewardFn
    weight: float
    options: Mapping[str, Any]
    checks_answer: bool


def load_term(fn: str, *, name: str, weight: float, options: Mapping[str, Any]) -> Term:
    """The term called `name`, whose function `fn` is a registered name, module:function, or path/to/file.py:function.

    Raises RewardError.
    """
    if fn in REGISTRY:
        function = REGISTRY[fn]
        return Term(name, True, function, weight, options, function in ANSWER_CHECKS)
    module_name, colon, function_name = fn.rpartition(":")
    if not colon:
        raise RewardError(f"reward {fn!r} is neither registered ({', '.join(REGISTRY)}) nor module:function")
    try:
        module = _load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(f"reward {fn!r} does not import: {type(error).__name__}: {error}") from error
    user_function: Any = getattr(module, function_name, None)
    if user_function is None:
        raise RewardError(f"reward {fn!r}: {module_name} has no function {function_name}")
    return Term(name, False, user_function, weight, options, False)


def _load_file(path: str) -> Any:
    file = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"no file {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score(terms: Sequence[Term], sample: Sample) -> tuple[float, dict[str, float]]:
    """The weighted sum over the terms that apply, and each term's own value.

    Raises RewardError if a term raises, gives NaN or infinity, or if none applies.
    """
    values = asyncio.run(_values(terms, sample))
    if not values:
        raise RewardError("no term applies")
    return sum(term.weight * values[term.name] for term in terms if term.name in values), values


async def _values(terms: Sequence[Term], sample: Sample) -> dict[str, float]:
    found = await asyncio.gather(*(_value(term, sample) for term in terms))
    return {term.name: value for term, value in zip(terms, found, strict=True) if value is not None}


async def _value(term: Term, sample: Sample, **more: Any) -> float | None:
    try:
        value = term.fn(sample, **term.options, **more)
        if inspect.isawaitable(value):
            value = await value
        value = None if value is None else float(value)
    except Exception as error:
        raise RewardError(f"{term.name}: {type(error).__name__}: {error}") from error
    if value is not None and not mathematics.isfinite(value):
        raise RewardError(f"{term.name} gave {value}")
    return value


def correctness(terms: Sequence[Term], sample: Sample) -> tuple[float | None, float | None]:
    """(strict, lenient) of the first term that checks the answer; a user's own term counts as both."""
    for term in terms:
        if term.checks_answer:
            strict = asyncio.run(_value(term, sample, strict=True))
            return strict, asyncio.run(_value(term, sample))
    value = asyncio.run(_value(terms[0], sample))
    return value, value


def gold_completion(terms: Sequence[Term], answer: str) -> str:
    """What a perfect completion looks like to these terms."""
    if any(term.fn is style.think_answer for term in terms):
        return f"<think>\nThe answer is known.\n</think>\n<answer>{answer}</answer>"
    return answer


def full_marks(terms: Sequence[Term]) -> float:
    """The highest sum that the registered terms can give; a user's own terms are left out."""
    return sum(term.weight for term in terms if term.weight > 0 and term.registered)


ANSWER_CHECKS = (answers.numeric, answers.math, answers.exact, answers.gym)
REGISTRY: dict[str, RewardFn] = {
    "numeric": answers.numeric,
    "math": answers.math,
    "exact": answers.exact,
    "gym": answers.gym,
    "think_answer": style.think_answer,
    "length": style.length,
}
