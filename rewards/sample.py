"""Sample: everything that a reward function may look at. Plain Python."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One completion and the question that it answers.

    `answer` is the reference answer, if the data has one. `answers` holds all acceptable ones, `answer` first.
    `tokens` is the completion's length, of at most `max_tokens`; `finish_reason` is "stop", or "length" if it was
    truncated. `metadata` is the prompt's row as it was read, by column.
    """

    question: str
    completion: str
    answer: str | None
    task: str = ""
    finish_reason: str = "stop"
    tokens: int = 0
    max_tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        only = () if self.answer is None else (self.answer,)
        object.__setattr__(self, "answers", tuple(self.answers) or only)


# Called with a Sample and the term's options from the settings. None: the term does not apply to this sample.
RewardFn = Callable[..., float | Awaitable[float | None] | None]
