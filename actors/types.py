"""Messages exchanged between workers: Prompt, Request, Completion, Trajectory, Group, Adapter.

Plain data. Loads neither vLLM nor Ray, and torch only with an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

FINISH_REASONS = ("stop", "length")
Purpose = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenized.

    `ordinal` is its index in the training order, or among the held-out prompts if its `purpose` is "evaluate"; both
    together are its identity everywhere. `answer`, all acceptable `answers` and `metadata` (a JSON text) are what the
    rewards need. `text` ends with `prefill`, the beginning of every answer.
    """

    ordinal: int
    text: str
    token_ids: tuple[int, ...]
    question: str
    answer: str | None
    task: str
    metadata: str = "{}"
    purpose: Purpose = "train"
    answers: tuple[str, ...] = ()
    prefill: str = ""

    @property
    def key(self) -> tuple[Purpose, int]:
        """What the prompt is known by."""
        return self.purpose, self.ordinal


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn: the `top_k` most probable ones (0: all), of these as few as have `top_p` of the
    probability, and only those that are at least `min_p` times as probable as the most probable one."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_off(self) -> bool:
        """Whether every token may be drawn."""
        return self == Truncation()


@dataclass(frozen=True)
class Sampling:
    """How to draw a completion; temperature 0 is greedy, whatever the truncation.

    It ends at the model's end-of-sequence token, at the first of the texts `stop`, or after `max_tokens`.
    """

    temperature: float
    max_tokens: int
    seed: int | None = None
    truncation: Truncation = Truncation()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One completion to sample, named by `request_id`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True)
class VersionSpan:
    """`count` consecutive sampled tokens that adapter `version` sampled."""

    version: int
    count: int


@dataclass(frozen=True)
class Completion:
    """What the engine sampled for one request.

    `logprobs` (nats, one per token) are those of the distribution that was sampled from. If `finish_reason` is "stop",
    `token_ids` ends with the end-of-sequence token or with the token that completes a stop text; `text` ends with that.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    version_spans: tuple[VersionSpan, ...]


@dataclass(frozen=True)
class Turn:
    """`length` consecutive tokens of a trajectory: `sampled` by the policy and trained, or given from outside."""

    sampled: bool
    length: int


@dataclass(frozen=True)
class Trajectory:
    """All tokens after the prompt, in `turns`.

    `logprobs` has one number for each sampled token, and `version_spans` cover the sampled tokens; given tokens have
    neither. `text` is what the rewards see.
    """

    token_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    version_spans: tuple[VersionSpan, ...]

    @classmethod
    def single_turn(cls, completion: Completion, *, prefill: str = "") -> Trajectory:
        """One answer, all of it sampled but for its beginning `prefill`, which is part of the prompt."""
        turns = (Turn(True, len(completion.token_ids)),)
        c = completion
        return cls(c.token_ids, turns, c.logprobs, prefill + c.text, c.finish_reason, c.version_spans)


@dataclass(frozen=True)
class Score:
    """The reward of one trajectory; `reward` is None where it could not be scored, with the reason in `error`."""

    reward: float | None
    terms: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    # Whether the answer is right: in the demanded form, and anywhere in the text. Filled in evaluation.
    strict: float | None = None
    lenient: float | None = None


@dataclass(frozen=True)
class Group:
    """All trajectories of one prompt, scored once `scores` is filled."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    worker: str
    attempt: int = 0
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class AdapterEntry:
    """The place of one LoRA matrix in the flat buffer: `side` is "A" (rank x in) or "B" (out x rank)."""

    module: str
    side: str
    shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This matrix as a view of a buffer that is laid out so."""
        return flat[self.offset : self.offset + self.size].view(self.shape)


@dataclass(frozen=True)
class AdapterLayout:
    """All entries of an adapter: first every A, then every B, so that one range holds all of B."""

    rank: int
    alpha: float
    entries: tuple[AdapterEntry, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def size(self) -> int:
        last = self.entries[-1]
        return last.offset + last.size

    @property
    def start_of_b(self) -> int:
        return next(entry.offset for entry in self.entries if entry.side == "B")


@dataclass(frozen=True)
class Adapter:
    """A version of the LoRA weights: one flat float32 tensor (`layout.size`) and what lies where in it."""

    version: int
    layout: AdapterLayout
    flat: torch.Tensor

    def __reduce__(self) -> tuple[Callable[..., Adapter], tuple[int, AdapterLayout, np.ndarray]]:
        """Sent as a NumPy array, whose bytes travel between workers without more copies."""
        return _adapter, (self.version, self.layout, self.flat.cpu().numpy())


def _adapter(version: int, layout: AdapterLayout, flat: np.ndarray) -> Adapter:
    """An Adapter that came from another process; its `flat` may lie in read-only memory."""
    import torch

    with warnings.catch_warnings(action="ignore"):
        return Adapter(version, layout, torch.from_numpy(flat))
