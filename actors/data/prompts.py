"""Prompts: rendered rows, split, and put into a seeded order with an exact cursor.

The prompt at an ordinal is a function of (seed, ordinal) alone, so a resumed run needs no state but a number. Knows
tokenizers; knows neither engines nor rewards.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from actors.data.readers import DataError
from actors.data.rendering import PLAIN, Rendering
from actors.data.sources import Row
from actors.types import Prompt

Rendered = tuple[Row, Prompt]


class PromptSet:
    """The prompts of a run: `train` in endless seeded epochs, and `held_out` for evaluation.

    Held-out prompts are the first `held_out` of `held_out_rows`. Without those, that many questions are set aside, and
    appear in no training row; `overlap` counts the held-out prompts that do. Prompts of over `max_prompt_tokens` tokens
    are left out and counted in `too_long`. Held-out rows are rendered by `held_out_rendering`, if there is one. Raises
    DataError if nothing is left, or if a row cannot be rendered.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        held_out: int,
        max_prompt_tokens: int,
        seed: int,
        held_out_rows: Sequence[Row] | None = None,
        rendering: Rendering = PLAIN,
        held_out_rendering: Rendering | None = None,
    ) -> None:
        self.too_long = 0
        self._max_prompt_tokens = max_prompt_tokens
        rendered = self._render_fitting(rows, tokenizer, rendering)
        if held_out_rows is None:
            held_out_rows, train = _split(rendered, held_out, seed)
        else:
            train = rendered
        self._train = [prompt for _, prompt in train]
        self.training_rows = [row for row, _ in train]
        evaluated = self._render_fitting(held_out_rows, tokenizer, held_out_rendering or rendering)[:held_out]
        self.held_out = [replace(p, ordinal=i, purpose="evaluate") for i, (_, p) in enumerate(evaluated)]
        trained = {_conversation(row) for row, _ in train}
        self.overlap = sum(_conversation(row) in trained for row, _ in evaluated)
        self._seed = seed
        self._epoch, self._order = -1, list(range(len(self._train)))

    def _render_fitting(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rendering: Rendering
    ) -> list[Rendered]:
        rendered = list(zip(rows, rendering.render(rows, tokenizer), strict=True))
        fitting = [(row, prompt) for row, prompt in rendered if len(prompt.token_ids) <= self._max_prompt_tokens]
        self.too_long += len(rendered) - len(fitting)
        if rows and not fitting:
            raise DataError(f"all {len(rendered)} prompts are over data.max_prompt_tokens={self._max_prompt_tokens}")
        return fitting

    @property
    def size(self) -> int:
        """Training prompts in one epoch."""
        return len(self._train)

    def at(self, ordinal: int) -> Prompt:
        """The prompt at index `ordinal` of the training order."""
        epoch, position = divmod(ordinal, len(self._train))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._train)))
            random.Random(f"order:{self._seed}:{epoch}").shuffle(self._order)
        return replace(self._train[self._order[position]], ordinal=ordinal)

    def fingerprint(self) -> str:
        """A hash of the training prompts, their answers and their order."""
        digest = hashlib.sha256(str(self._seed).encode())
        for prompt in self._train:
            digest.update(json.dumps([prompt.token_ids, prompt.answer, *prompt.answers[1:]]).encode())
        return digest.hexdigest()[:16]


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
