"""Epiphany: reinforcement learning of language models on LoRA adapters. This is the Python API.

    import epiphany

    settings = epiphany.load_settings("model=qwen2.5-1.5b", "data=gsm8k", "run.steps=50")
    epiphany.train(settings)

    epiphany.generate("Ann has 3 apples and buys 4. How many has she?", "run=runs/gsm8k")

`load_settings` takes what stands behind `python launch.py`; `train` runs until the run's last step, and `generate`
answers questions. Importing it raises ImportError if a file of yours hides one of its packages.
"""

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load_settings", "train"]

if TYPE_CHECKING:
    from conf.schema import Settings


def load_settings(*overrides: str) -> "Settings":
    """The checked settings that `python launch.py <overrides>` would have. Raises conf.errors.UsageError."""
    from epiphany.run_settings import load_settings as settings_of_command

    return settings_of_command(*overrides)


def train(settings: "Settings") -> int:
    """Train, or resume, the run that `settings` describe.

    Returns 0, or 128 and the number of the signal that stopped it. Raises conf.errors.UsageError for what a user can
    correct. Call it from the main thread: it handles SIGINT and SIGTERM while it runs.
    """
    from conf.errors import UsageError
    from epiphany import commands
    from launch import train as loop

    if threading.current_thread() is not threading.main_thread():
        raise UsageError("epiphany.train handles signals, and must be called from the main thread")
    return commands.train(settings, loop)


def generate(questions: "str | Sequence[str]", *overrides: str) -> list[str]:
    """The model's answers to the questions, in their order, as `python launch.py task=generate <overrides>` gives them.

    With `generate.samples` over 1, all answers to a question stand together. Raises conf.errors.UsageError.
    """
    from conf.errors import UsageError
    from epiphany import commands
    from epiphany.rows import system_prompt_of

    settings = load_settings("task=generate", *overrides)
    if settings.generate.prompt is not None or settings.generate.prompts is not None:
        raise UsageError("epiphany.generate takes its questions as the first argument, not as an override")
    with commands.using_a_model() as (note, closing):
        from epiphany.use.generate import answers, text_rows

        texts = [questions] if isinstance(questions, str) else questions
        rows = text_rows(texts, system_prompt_of(settings, settings.data.system_prompt))
        return [answer.answer for answer in answers(settings, rows, note=note, closing=closing)]


def _refuse_shadows() -> None:
    """Raises ImportError if a file comes before one of ours on the import path, under its name."""
    root = Path(__file__).resolve().parents[1]
    for name in ("conf", "rewards", "actors", "learner", "launch"):
        ours = root / f"{name}.py" if name == "launch" else root / name / "__init__.py"
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != ours:
            raise ImportError(f"{spec.origin} hides {name}, which is Epiphany's; rename it, or start in another folder")


_refuse_shadows()
