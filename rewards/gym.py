"""Adapter for reasoning-gym, which is imported nowhere else."""

import functools
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping

# Tasks whose scorers hand the answer to eval, or to sympy's parser, which evaluates it: they would run what a model
# wrote.
EVALUATED = (
    *("countdown", "puzzle24", "n_queens", "string_insertion", "spiral_matrix", "binary_matrix"),
    *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
)
# What such an answer may be made of: numbers, operators, brackets, names, and words in quotes. Only these functions are
# called, and no attribute is read: a dot must be in a number.
FUNCTIONS = "a?(?:sin|cos|tan|sec|csc|cot)h?|exp|log|ln|sqrt|Abs|sign|gamma|erfi?|Integral|Piecewise"
PARTS = (
    r"[\s+\-*/^()\[\],=|]",
    r"\d+(?:\.\d*)?|\.\d+",
    rf"\b(?:{FUNCTIONS})\b",
    r"\b[A-Za-z_]\w*\b(?!\s*\()",
    r"'[\w ]*'|\"[\w ]*\"",
)
HARMLESS = re.compile(f"(?:{'|'.join(PARTS)})*")


@functools.cache
def reasoning_gym() -> types.ModuleType:
    """The module reasoning_gym. Raises ImportError if it is not installed."""
    if importlib.util.find_spec("pycosat") is None:
        # reasoning-gym 0.1.25 imports pycosat, which has no wheels and needs a compiler, for two puzzles only.
        # Remove when it becomes optional there.
        stand_in = types.ModuleType("pycosat")

        def solve(*_args: object, **_kwargs: object) -> None:
            raise ImportError("this reasoning-gym task needs the package pycosat: pip install pycosat")

        stand_in.__dict__["solve"] = solve
        sys.modules["pycosat"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by a package that reasoning-gym imports
        import reasoning_gym as module

    return module


@functools.cache
def _scorer(task: str) -> Callable[..., float]:
    return reasoning_gym().get_score_answer_fn(task)


def score_answer(task: str, answer: str, entry: Mapping[str, object]) -> float:
    """reasoning-gym's score in 0 to 1 of `answer` for the row `entry` of `task`.

    An answer to one of EVALUATED that is more than an expression or a list gets 0, and is not handed on.
    """
    if task in EVALUATED and not HARMLESS.fullmatch(answer):
        return 0.0
    return float(_scorer(task)(answer=answer, entry=entry))
