"""Reward functions by name: those of this package, and a user's own. Plain Python."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rewards import correctness, format, instructions, structure, text
from rewards.composition import Term
from rewards.errors import RewardError
from rewards.sample import RewardFn
from rewards.user_function import check_call, load_user_function


@dataclass(frozen=True)
class RegisteredReward:
    """A function of this package; the other fields are those of composition.Term."""

    fn: RewardFn
    checks_answer: bool = False
    max_score: float = 1.0
    reference_completion: Callable[[str], str] | None = str


def load_term(fn: str, *, name: str, weight: float, options: Mapping[str, object]) -> Term:
    """The term called `name`, whose function `fn` is a registered name, module:function, or path/to/file.py:function.

    Raises RewardError if there is no such function, or it does not take these options.
    """
    if fn in REGISTRY:
        registered = REGISTRY[fn]
        check_call(registered.fn, fn, options)
        return Term(
            name,
            registered.fn,
            weight,
            options,
            checks_answer=registered.checks_answer,
            max_score=registered.max_score,
            reference_completion=registered.reference_completion,
        )
    if ":" not in fn:
        raise RewardError(
            f"reward {fn!r} is neither registered ({', '.join(REGISTRY)}) nor module:function nor "
            "path/to/file.py:function"
        )
    function, folder = load_user_function(fn, options)
    return Term(name, function, weight, options, folder=folder)


REGISTRY: dict[str, RegisteredReward] = {
    "numeric": RegisteredReward(correctness.numeric, checks_answer=True),
    "math": RegisteredReward(correctness.math, checks_answer=True),
    "exact": RegisteredReward(correctness.exact, checks_answer=True),
    "gym": RegisteredReward(correctness.gym, checks_answer=True),
    "choice": RegisteredReward(correctness.choice, checks_answer=True),
    "json_fields": RegisteredReward(structure.json_fields, checks_answer=True),
    "instructions": RegisteredReward(instructions.instructions, checks_answer=True, reference_completion=None),
    "similarity": RegisteredReward(text.similarity),
    "think_answer": RegisteredReward(format.think_answer, reference_completion=format.in_think_answer_tags),
    "tags": RegisteredReward(format.tags, reference_completion=format.in_think_answer_tags),
    "tag_order": RegisteredReward(format.tag_order, reference_completion=format.in_think_answer_tags),
    "inside_tags": RegisteredReward(format.inside_tags, reference_completion=format.in_think_answer_tags),
    "length": RegisteredReward(format.length),
    "soft_overlong": RegisteredReward(format.soft_overlong, max_score=0.0, reference_completion=None),
    # Of a reference answer alone nothing can be said about these.
    "xml_tags": RegisteredReward(structure.xml_tags, reference_completion=None),
    "json_schema": RegisteredReward(structure.json_schema, reference_completion=None),
    "regex": RegisteredReward(structure.regex, reference_completion=None),
    "steps": RegisteredReward(structure.steps, reference_completion=None),
    "spelling": RegisteredReward(text.spelling, reference_completion=None),
    "language": RegisteredReward(text.language, reference_completion=None),
    "repetition": RegisteredReward(text.repetition, reference_completion=None),
}
