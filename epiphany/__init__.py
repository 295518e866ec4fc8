"""Epiphany: reinforcement learning of language models on LoRA adapters. This is the Python API.

    import epiphany

    settings = epiphany.load_settings("model=qwen2.5-1.5b", "data=gsm8k", "run.steps=50")
    epiphany.train(settings)

`load_settings` takes what stands behind `python launch.py`; `train` runs until the run's last step. Importing it raises
ImportError if a file of yours hides one of its packages.
"""

import importlib.util
import threading
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load_settings", "train"]

if TYPE_CHECKING:
    from conf.schema import Settings


def load_settings(*overrides: str) -> "Settings":
    """The checked settings that `python launch.py <overrides>` would have. Raises conf.errors.UsageError."""
    from conf.compose import load_settings as compose_settings

    return compose_settings(*overrides)


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


def _refuse_shadows() -> None:
    """Raises ImportError if a file comes before one of ours on the import path, under its name."""
    root = Path(__file__).resolve().parents[1]
    for name in ("conf", "rewards", "actors", "learner", "launch"):
        ours = root / f"{name}.py" if name == "launch" else root / name / "__init__.py"
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() != ours:
            raise ImportError(f"{spec.origin} hides {name}, which is Epiphany's; rename it, or start in another folder")


_refuse_shadows()
