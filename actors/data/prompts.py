"""Prompts: rows rendered by the chat template, split, and put into a seeded order with an exact cursor.

The prompt at an ordinal is a function of (seed, ordinal) alone, so a resumed run needs no state but a number. Knows
tokenizers; knows neither engines nor rewards.
"""

import hashlib
import inspect
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from actors.data.readers import DataError
from actors.data.sources import Row
from actors.types import Prompt


class PromptSet:
    """The prompts of a run: `train` in endless seeded epochs, and `held_out` for evaluation.

    Held-out prompts are the first `held_out` of `held_out_rows`. Without those, that many questions are set aside, and
    appear in no training row; `overlap` counts the held-out prompts that do. Prompts of over `max_prompt_tokens` tokens
    are left out and counted in `too_long`. Every prompt ends with `prefill`, and `template_variables` are passed to the
    chat template. Raises DataError if nothing is left, or if the template does not read one of them.
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
        prefill: str = "",
        template_variables: Mapping[str, object] | None = None,
    ) -> None:
        self.too_long = 0
        self._prefill, self._template_variables = prefill, dict(template_variables or {})
        _check_variables(tokenizer, self._template_variables)
        self._max_prompt_tokens = max_prompt_tokens
        prompts = self._render_fitting(rows, tokenizer)
        if held_out_rows is None:
            held_out_prompts, self._train = _split(prompts, held_out, seed)
        else:
            held_out_prompts = self._render_fitting(held_out_rows, tokenizer)[:held_out]
            self._train = prompts
        trained = {p.text for p in self._train}
        self.overlap = sum(p.text in trained for p in held_out_prompts)
        self.held_out = [replace(p, ordinal=i, purpose="evaluate") for i, p in enumerate(held_out_prompts)]
        self._seed = seed
        self._epoch, self._order = -1, list(range(len(self._train)))

    def _render_fitting(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        prompts = [_render(row, tokenizer, prefill=self._prefill, variables=self._template_variables) for row in rows]
        fitting = [p for p in prompts if len(p.token_ids) <= self._max_prompt_tokens]
        self.too_long += len(prompts) - len(fitting)
        if not fitting:
            raise DataError(f"all {len(prompts)} prompts are over data.max_prompt_tokens={self._max_prompt_tokens}")
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


def _split(prompts: list[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """One prompt for each of `count` distinct questions, and every prompt with another question."""
    questions = list(dict.fromkeys(p.text for p in prompts))
    if count >= len(questions):
        raise DataError(
            f"data.held_out={count} leaves nothing to train on: there are {len(questions)} distinct prompts"
        )
    random.Random(f"split:{seed}").shuffle(questions)
    first = {p.text: p for p in reversed(prompts)}
    chosen = set(questions[:count])
    return [first[text] for text in questions[:count]], [p for p in prompts if p.text not in chosen]


def _check_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, object]) -> None:
    template = str(tokenizer.chat_template)
    taken = sorted(variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"kwargs"})
    if taken or "messages" in variables:
        raise DataError(f"model.chat_template_kwargs: {', '.join(taken) or 'messages'} is not the template's to choose")
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise DataError(f"model.chat_template_kwargs: the model's chat template reads no {name!r}")


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, *, prefill: str, variables: Mapping[str, object]) -> Prompt:
    messages = [dict(message) for message in row.messages]
    try:
        render = cast("Callable[..., object]", tokenizer.apply_chat_template)
        rendered = render(messages, add_generation_prompt=True, tokenize=False, **variables)
    except TemplateError as error:
        raise DataError(
            f"the model's chat template refuses the prompt {row.question[:60]!r}: {error}; change the messages, "
            "data.system_prompt or model.chat_template"
        ) from error
    text = str(rendered) + prefill
    token_ids = cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(
        ordinal=0,
        text=text,
        token_ids=tuple(token_ids),
        question=row.question,
        answer=row.answer,
        task=row.task,
        metadata=json.dumps(row.metadata),
        answers=row.answers,
        prefill=prefill,
    )
