"""Adapter for reasoning-gym, which is imported nowhere else."""

import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Mapping


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
    """reasoning-gym's score in 0 to 1 of `answer` for the row `entry` of `task`."""
    return float(_scorer(task)(answer=answer, entry=entry))
