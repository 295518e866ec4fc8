"""A row as a prompt: its messages in the model's chat template, as tokens. Knows tokenizers; knows no order of rows."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from actors.data.readers import DataError
from actors.data.sources import Row
from actors.types import Prompt

TEMPLATE_SECONDS = 20.0  # for the first prompt; a template takes milliseconds


@dataclass(frozen=True)
class Rendering:
    """How rows become prompts: `variables` are passed to the chat template, and every prompt ends with `prefill`."""

    prefill: str = ""
    variables: Mapping[str, object] = field(default_factory=dict)

    def render(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The prompt of each row, with ordinal 0.

        Raises DataError if the chat template does not read one of the variables, refuses a row or does not end.
        """
        if not rows:
            return []
        self._check_variables(tokenizer)
        # A loop in a template cannot be stopped, but a daemon thread is left behind when the process ends.
        pool = ThreadPool(1)
        try:
            first = pool.apply_async(self._prompt, (rows[0], tokenizer)).get(TEMPLATE_SECONDS)
        except TimeoutError as error:
            raise DataError(
                f"the model's chat template does not end within {TEMPLATE_SECONDS:.0f} s; set model.chat_template"
            ) from error
        pool.close()
        return [first, *(self._prompt(row, tokenizer) for row in rows[1:])]

    def _check_variables(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template, names = str(tokenizer.chat_template), self.variables.keys()
        taken = sorted(names & inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"kwargs"})
        if taken or "messages" in names:
            raise DataError(f"chat_template_kwargs: {', '.join(taken) or 'messages'} is set by Epiphany; leave it out")
        for name in names:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise DataError(f"chat_template_kwargs: the model's chat template reads no {name!r}")

    def _prompt(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        text = self.conversation(row.messages, tokenizer, add_generation_prompt=True) + self.prefill
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
            prefill=self.prefill,
        )

    def conversation(
        self,
        messages: Sequence[Mapping[str, object]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Messages in the chat template. Raises DataError if it refuses them."""
        try:
            render = cast("Callable[..., object]", tokenizer.apply_chat_template)
            plain = [dict(message) for message in messages]
            return str(render(plain, add_generation_prompt=add_generation_prompt, tokenize=False, **self.variables))
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # what Jinja lets through
            raise DataError(
                f"the model's chat template refuses the prompt {str(messages[-1]['content'])[:60]!r}: {error}; change "
                "the messages, data.system_prompt or model.chat_template"
            ) from error


PLAIN = Rendering()
