"""The reward of a sample: the weighted sum of terms, and whether a term says that the answer is right. Plain Python.

Knows what a term is; knows neither names nor files of reward functions.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.errors import RewardError, describe_error
from rewards.sample import RewardFn, Sample


@dataclass(frozen=True)
class Term:
    """One term of the sum, with a name of its own and `options` for its function.

    `checks_answer`: the function says whether the answer is right, and takes `strict`. `max_score` is the largest value
    that the function gives (None: not known), `reference_completion` turns a reference answer into a completion that
    gets it (None: a reference answer alone does not say how). `folder` holds the user's own function: errors name the
    file and line there. The term scores the samples of the `sources` only, or all if there are none.
    """

    name: str
    fn: RewardFn
    weight: float
    options: Mapping[str, object]
    checks_answer: bool = False
    max_score: float | None = None
    reference_completion: Callable[[str], str] | None = str
    folder: Path | None = None
    sources: Sequence[str] = ()

    def scores(self, source: str) -> bool:
        """Whether the term scores samples of this source."""
        return not self.sources or source in self.sources


def score(terms: Sequence[Term], sample: Sample) -> tuple[float, dict[str, float]]:
    """The weighted sum over the terms that apply, and the value of each of them by name.

    Raises RewardError if a term raises or gives NaN or infinity, or if none applies.
    """
    terms = [term for term in terms if term.scores(sample.task)]
    values = asyncio.run(_values(terms, sample))
    if not values:
        raise RewardError("no term applies")
    return sum(term.weight * values[term.name] for term in terms if term.name in values), values


async def _values(terms: Sequence[Term], sample: Sample) -> dict[str, float]:
    values = await asyncio.gather(*(_value(term, sample) for term in terms))
    return {term.name: value for term, value in zip(terms, values, strict=True) if value is not None}


async def _value(term: Term, sample: Sample, **more: object) -> float | None:
    try:
        value = term.fn(sample, **term.options, **more)
        if inspect.isawaitable(value):
            value = await value
        value = None if value is None else float(value)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(describe_error(error, folder=term.folder, otherwise=term.name)) from error
    if value is not None and not math.isfinite(value):
        raise RewardError(f"{term.name} gave {value}")
    return value


def correctness(terms: Sequence[Term], sample: Sample) -> tuple[float | None, float | None]:
    """Whether the answer is right, as (strict, lenient): by the first term that checks answers and applies.

    (None, None) if there is no such term. Raises RewardError if it raises.
    """
    for term in terms:
        if term.checks_answer and term.scores(sample.task):
            strict = asyncio.run(_value(term, sample, strict=True))
            if strict is not None:
                return strict, asyncio.run(_value(term, sample))
    return None, None


def reference_completion(terms: Sequence[Term], answer: str) -> str:
    """A completion with the reference answer `answer`, in the form that the terms ask for."""
    for write in dict.fromkeys(term.reference_completion for term in terms if term.reference_completion):
        answer = write(answer)
    return answer


def expected_scores(terms: Sequence[Term]) -> dict[str, float]:
    """What the terms with a positive weight, where that is known, give to the completion with a reference answer."""
    return {
        term.name: term.max_score
        for term in terms
        if term.weight > 0 and term.max_score is not None and term.reference_completion is not None
    }


def max_score(terms: Sequence[Term]) -> float | None:
    """The largest sum that the terms can give; None if the maximum of one with a positive weight is not known."""
    total = None
    for term in terms:
        if term.weight > 0:
            if term.max_score is None:
                return None
            total = (total or 0.0) + term.weight * term.max_score
    return total
