"""Prompts: rendered rows, split, and put into a seeded order with an exact cursor.

The prompt at an ordinal is a function of (seed, ordinal) and, where solved prompts come again rarely, of what was
recorded. Knows tokenizers; knows neither engines nor rewards.
"""

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.data.order import Epochs, Mixture
from actors.data.readers import DataError
from actors.data.rendering import PLAIN, Rendering
from actors.data.sources import Row
from actors.types import Prompt

PASS_RATE = "pass_rate"  # the column that task=difficulty writes
Rendered = tuple[Row, Prompt]


@dataclass(frozen=True)
class Source:
    """Rows to train on, and the share of the prompts that come from them, relative to other sources."""

    name: str
    rows: Sequence[Row]
    weight: float = 1.0


class PromptSet:
    """The prompts of a run: an endless training order over all `sources`, and `held_out` for evaluation.

    Held-out prompts are the first `held_out` of `held_out_rows`. Without those, that many questions of each source are
    set aside, and appear in no training row; `overlap` counts the held-out prompts that do. Prompts of over
    `max_prompt_tokens` tokens are left out and counted in `too_long`, and training rows whose `pass_rate` is not in the
    range `difficulty` in `outside`. Held-out rows are rendered by `held_out_rendering`, if there is one. Raises
    DataError if nothing is left, or if a row cannot be rendered or has no pass rate.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        held_out: int,
        max_prompt_tokens: int,
        seed: int,
        held_out_rows: Sequence[Row] | None = None,
        rendering: Rendering = PLAIN,
        held_out_rendering: Rendering | None = None,
        difficulty: Sequence[float] | None = None,
        revisit_solved: float = 1.0,
    ) -> None:
        self.too_long = self.outside = 0
        self._max_prompt_tokens = max_prompt_tokens
        aside: list[list[Row]] = []
        train: list[list[Rendered]] = []
        for source in sources:
            rendered = self._render_fitting(source.rows, tokenizer, rendering)
            if held_out_rows is None:
                rows, rendered = _split(rendered, held_out, seed)
                aside.append(rows)
            train.append(self._within(rendered, difficulty, source.name))
        self._train = [[prompt for _, prompt in rendered] for rendered in train]
        self.training_rows = [row for rendered in train for row, _ in rendered]
        if held_out_rows is None:
            # One of each source in turn, so that the first ones are a sample of all.
            held_out_rows = [row for rows in zip_longest(*aside) for row in rows if row is not None]
            held_out = len(held_out_rows)
        evaluated = self._render_fitting(held_out_rows, tokenizer, held_out_rendering or rendering)[:held_out]
        self.held_out = [replace(p, ordinal=i, purpose="evaluate") for i, (_, p) in enumerate(evaluated)]
        trained = {_conversation(row) for row in self.training_rows}
        self.overlap = sum(_conversation(row) in trained for row, _ in evaluated)
        self._names, self._weights = [source.name for source in sources], [source.weight for source in sources]
        self._seed = seed
        self._mixture = Mixture(self._weights)
        self._epochs = [Epochs(len(prompts), seed, revisit_solved) for prompts in self._train]

    @property
    def sizes(self) -> dict[str, int]:
        """Training prompts of each source."""
        return {name: len(prompts) for name, prompts in zip(self._names, self._train, strict=True)}

    @property
    def size(self) -> int:
        """Training prompts of all sources."""
        return sum(self.sizes.values())

    def at(self, ordinal: int) -> Prompt:
        """The prompt at index `ordinal` of the training order."""
        source, row = self._place(ordinal)
        return replace(self._train[source][row], ordinal=ordinal)

    def record(self, ordinals: Iterable[int], *, solved: Collection[int]) -> None:
        """Remember which groups of these prompts were solved: those in `solved` got the full score throughout."""
        for ordinal in ordinals:
            source, row = self._place(ordinal)
            self._epochs[source].record(row, solved=ordinal in solved)

    def end_step(self) -> None:
        """A step is done: the next epochs may depend on what was recorded until now."""
        for epochs in self._epochs:
            epochs.end_step()

    def checkpoint(self) -> dict[str, object]:
        """What a checkpoint stores of the order, by source; nothing of an order that depends on the seed alone."""
        return {name: epochs.checkpoint() for name, epochs in zip(self._names, self._epochs, strict=True)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `checkpoint` returned."""
        for name, epochs in zip(self._names, self._epochs, strict=True):
            epochs.restore(state.get(name, {}))

    def fingerprint(self) -> str:
        """A hash of the training prompts, their answers and their order."""
        digest = hashlib.sha256(str(self._seed).encode())
        if len(self._train) > 1:
            digest.update(json.dumps([self._names, self._weights, list(self.sizes.values())]).encode())
        for prompt in (prompt for prompts in self._train for prompt in prompts):
            digest.update(json.dumps([prompt.token_ids, prompt.answer, *prompt.answers[1:]]).encode())
        return digest.hexdigest()[:16]

    def _place(self, ordinal: int) -> tuple[int, int]:
        """The source and the row of a prompt of the training order."""
        source, position = self._mixture.at(ordinal)
        return source, self._epochs[source].at(position)

    def _within(self, rendered: list[Rendered], difficulty: Sequence[float] | None, source: str) -> list[Rendered]:
        """Those whose pass rate is in the range."""
        if difficulty is None:
            return rendered
        low, high = difficulty
        if unknown := next((row for row, _ in rendered if PASS_RATE not in row.metadata), None):
            raise DataError(
                f"data.difficulty: {unknown.place} has no {PASS_RATE}; task=difficulty writes a file whose rows have it"
            )
        within = [(row, p) for row, p in rendered if (rate := pass_rate(row)) is not None and low <= rate <= high]
        self.outside += len(rendered) - len(within)
        if not within:
            raise DataError(f"data.difficulty=[{low:g}, {high:g}]: no row of {source} has a pass rate in between")
        return within

    def _render_fitting(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
    ) -> list[Rendered]:
        rendered = list(zip(rows, rendering.render(rows, tokenizer), strict=True))
        fitting = [(row, prompt) for row, prompt in rendered if len(prompt.token_ids) <= self._max_prompt_tokens]
        self.too_long += len(rendered) - len(fitting)
        if rows and not fitting:
            raise DataError(f"all {len(rendered)} prompts are over data.max_prompt_tokens={self._max_prompt_tokens}")
        return fitting


def pass_rate(row: Row) -> float | None:
    """The share of right answers that task=difficulty saw; None if the prompt was too long. Raises DataError."""
    rate = row.metadata[PASS_RATE]
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1):
        raise DataError(f"{row.place}: {PASS_RATE} is {rate!r}; it must be between 0 and 1, or null")
    return rate


def _split(rendered: Sequence[Rendered], count: int, seed: int) -> tuple[list[Row], list[Rendered]]:
    """One row for each of `count` distinct questions, and every row with another question."""
    questions = list(dict.fromkeys(prompt.text for _, prompt in rendered))
    if count >= len(questions):
        raise DataError(
            f"data.held_out={count} leaves nothing to train on: there are {len(questions)} distinct prompts"
        )
    random.Random(f"split:{seed}").shuffle(questions)
    first = {prompt.text: row for row, prompt in reversed(rendered)}
    chosen = set(questions[:count])
    return [first[text] for text in questions[:count]], [(r, p) for r, p in rendered if p.text not in chosen]


def _conversation(row: Row) -> str:
    return json.dumps([dict(message) for message in row.messages])
