"""Adapter for reasoning-gym, which is imported nowhere else."""

import ast
import functools
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping

# Tasks whose scorers hand the answer to eval (LISTS), or to sympy's parser, which evaluates it (EXPRESSIONS): they
# would run what a model wrote.
LISTS = ("n_queens", "string_insertion", "spiral_matrix", "binary_matrix")
EXPRESSIONS = (
    *("countdown", "puzzle24"),
    *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
)
# What an expression may call, and how large an exponent may be: 9**9**9 would never end.
FUNCTIONS = re.compile("a?(?:sin|cos|tan|sec|csc|cot)h?|exp|log|ln|sqrt|Abs|sign|gamma|erfi?|Integral")
MAX_EXPONENT = 1000
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.BitXor, ast.UAdd, ast.USub)


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

    An answer that would be evaluated and is more than an expression or a list gets 0, and is not handed on.
    """
    if (task in LISTS and not _is_list(answer)) or (task in EXPRESSIONS and not _is_expression(answer)):
        return 0.0
    return float(_scorer(task)(answer=answer, entry=entry))


def _is_list(answer: str) -> bool:
    """Whether eval gives no more than lists of numbers and texts for `answer`, or refuses it."""
    tree = _parsed(answer)
    allowed = (ast.Expression, ast.List, ast.Tuple, ast.Constant, ast.Name, ast.Load)
    return tree is None or all(isinstance(node, allowed) for node in ast.walk(tree))


def _is_expression(answer: str) -> bool:
    """Whether `answer` is arithmetic with numbers, names and FUNCTIONS. A text is none: sympy would parse that, too."""
    tree = _parsed(answer)
    return tree is not None and all(map(_is_arithmetic, ast.walk(tree)))


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant():
            return isinstance(node.value, (int, float))
        case ast.Call(func=ast.Name(id=name)):
            return not node.keywords and FUNCTIONS.fullmatch(name) is not None
        case ast.BinOp(op=ast.Pow() | ast.BitXor()):
            numbers = [part.value for part in ast.walk(node.right) if isinstance(part, ast.Constant)]
            nested = any(isinstance(part, (ast.Pow, ast.BitXor)) for part in ast.walk(node.right))
            return not nested and all(isinstance(n, (int, float)) and n <= MAX_EXPONENT for n in numbers)
        case _:
            return isinstance(node, (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, *OPERATORS))


def _parsed(answer: str) -> ast.Expression | None:
    """The answer as Python reads it; None if that refuses it."""
    try:
        return ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
