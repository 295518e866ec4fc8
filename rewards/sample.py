"""Sample: all that a reward function may look at. Plain Python."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One completion and what it answers.

    `tokens` counts the completion's tokens, of at most `max_tokens`; `metadata` is the prompt's row as it was read.
    """

    question: str
    completion: str
    answer: str | None
    task: str = ""
    finish_reason: str = "stop"
    tokens: int = 0
    max_tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


# None: this term does not apply to this sample. Keyword arguments are the term's options from the YAML.
RewardFn = Callable[..., float | Awaitable[float | None] | None]
