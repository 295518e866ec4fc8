"""A user's own reward function: its import, and TRL's signature adapted to ours. Plain Python.

Ours is `(sample, **options) -> float | None`. TRL's is `(prompts, completions, **columns) -> list of floats`; a
function with a parameter `completions` is called that way, with lists of one element.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import cast

from rewards.errors import RewardError, describe_error
from rewards.sample import RewardFn, Sample

SIGNATURES = "a reward takes (sample, **options), or as in TRL (prompts, completions, **columns)"
# Arguments of TRL's trainer that have no counterpart here.
ONLY_IN_TRL = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def load_user_function(path: str, options: Mapping[str, object]) -> tuple[RewardFn, Path | None]:
    """The function `path`, which is module:function or path/to/file.py:function, and the folder of its file.

    Raises RewardError if it cannot be imported, or cannot be called with a sample and `options`.
    """
    module_name, _, name = path.rpartition(":")
    is_file = module_name.endswith(".py")
    file = Path(module_name).expanduser().resolve()
    try:
        module = _import_file(file) if is_file else importlib.import_module(module_name)
    except Exception as error:
        reason = describe_error(error, folder=file.parent if is_file else None)
        raise RewardError(f"reward {path!r} does not import: {reason}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward {path!r}: {module_name} has no function {name}")
    folder = None if module.__file__ is None else Path(module.__file__).parent
    if "completions" in _parameters(function):
        return _adapt_trl(function, path, options), folder
    check_call(function, path, options)
    return cast(RewardFn, function), folder


def import_object(path: str) -> object:
    """What module:name or path/to/file.py:name names. Raises ImportError, AttributeError or ValueError."""
    module_name, colon, name = path.rpartition(":")
    if not colon:
        raise ValueError("there is no : in it")
    if module_name.endswith(".py"):
        return getattr(_import_file(Path(module_name).expanduser().resolve()), name)
    return getattr(importlib.import_module(module_name), name)


def check_call(function: Callable[..., object], path: str, options: Mapping[str, object]) -> None:
    """Raises RewardError if the function called `path` cannot be called with a sample and `options`."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a C function that does not tell
        return
    try:
        signature.bind(None, **options)
    except TypeError as error:
        raise RewardError(f"reward {path!r}: {error} (options: {dict(options)}); {SIGNATURES}") from error


def _import_file(file: Path) -> ModuleType:
    """The module in `file`, which can import its neighbors. Modules of the same name elsewhere come first for them."""
    name = f"user_file:{file.with_suffix('')}".replace(".", "_")  # no import statement can name it
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(f"no file {file}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _parameters(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _adapt_trl(function: Callable[..., object], path: str, options: Mapping[str, object]) -> RewardFn:
    """`function`, which has TRL's signature, as a function of one sample. Raises RewardError if that cannot work."""
    parameters = _parameters(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    required = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    if foreign := sorted(required.intersection(ONLY_IN_TRL)):
        raise RewardError(f"reward {path!r} requires {', '.join(foreign)}, which only TRL has; {SIGNATURES}")
    if unknown := [] if takes_any else sorted(options.keys() - parameters.keys()):
        raise RewardError(f"reward {path!r} has no parameter {', '.join(unknown)} (options)")

    def reward(sample: Sample, **options: object) -> float | Awaitable[float | None] | None:
        columns = {name: [value] for name, value in sample.metadata.items() if name not in ("prompt", "completion")}
        arguments = {**columns, **_prompt_and_completion(sample), **options}
        if missing := sorted(required - arguments.keys()):
            raise RewardError(
                f"{path} takes {', '.join(missing)}, but the data has no such column (it has {', '.join(columns)})"
            )
        result = function(**{name: x for name, x in arguments.items() if takes_any or name in parameters})
        return _awaited(result, path) if inspect.isawaitable(result) else _only(result, path)

    return reward


def _prompt_and_completion(sample: Sample) -> dict[str, object]:
    """TRL's `prompts` and `completions`: messages where the column `prompt` holds messages, else texts."""
    prompt = sample.metadata.get("prompt")
    if isinstance(prompt, list):
        return {"prompts": [prompt], "completions": [[{"role": "assistant", "content": sample.completion}]]}
    return {"prompts": [sample.question], "completions": [sample.completion]}


async def _awaited(result: Awaitable[object], path: str) -> float | None:
    return _only(await result, path)


def _only(result: object, path: str) -> float | None:
    """The one element of a list, tuple, array or tensor. Raises RewardError if `result` is nothing of the kind."""
    try:
        (value,) = result  # type: ignore[misc]
    except (TypeError, ValueError):
        given = repr(result)[:100]
        raise RewardError(f"{path} must return a list with one score for each completion; it gave {given}") from None
    return None if value is None else float(value)


def absolute_name(fn: str) -> str:
    """The name of a function with the path of its .py file made absolute, so that a child finds it from anywhere."""
    module, colon, function = fn.rpartition(":")
    return f"{Path(module).expanduser().resolve()}:{function}" if colon and module.endswith(".py") else fn
