"""task=chat: a conversation with a run's model, or with a model alone, which shows each answer as it comes."""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from actors.data.rendering import Rendering
from actors.engines.stop_strings import StopStrings
from actors.models.loading import load_config, positions_of
from actors.types import Adapter, Request, Sampling
from conf.errors import UsageError
from conf.schema import Settings
from epiphany.rows import system_prompt_of
from epiphany.run_data import evaluation_rendering, load_model_source
from epiphany.use.model import Load, ModelInUse, answer_sampling, describe, open_model

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # of a character whose other bytes are still to come
HELP = "/new begins another conversation, /quit or the end of the input ends this one"
Message = Mapping[str, str]


@dataclass
class Conversation:
    """Messages in a chat template, kept within `context_tokens` by leaving out the oldest question and answer."""

    model: ModelInUse
    rendering: Rendering
    sampling: Sampling
    system_prompt: str | None
    context_tokens: int
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._loaded = self.model.adapter

    def clear(self) -> None:
        """Begin again."""
        self.messages = []

    def prompt(self, text: str) -> tuple[list[int], int]:
        """The tokens of the conversation with the question `text` at its end, and how many exchanges were left out.

        Raises UsageError if the question alone is too long.
        """
        first = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        asked = {"role": "user", "content": text}
        left_out, kept = 0, list(self.messages)
        while len(token_ids := self._tokens([*first, *kept, asked])) > self.context_tokens:
            if not kept:
                raise UsageError(
                    f"this has {len(token_ids)} tokens, more than chat.context_tokens={self.context_tokens}"
                )
            left_out, kept = left_out + 1, kept[2:]
        self.messages = [*kept, asked]
        return token_ids, left_out

    def answer(self, token_ids: list[int], adapter: Adapter) -> Iterator[str]:
        """The pieces of the answer under `adapter` as they come, the prefilled beginning first."""
        model, name = self.model, f"{next(self._numbers)}"
        if adapter is not self._loaded:  # else the engine's cache still has the conversation
            model.engine.load_adapter(adapter)
            self._loaded = adapter
        model.engine.submit([Request(name, tuple(token_ids), self.sampling)])
        shown = ""
        yield self.rendering.prefill
        while True:
            finished = model.engine.step()
            if finished:
                yield finished[0].text.removeprefix(shown)
                return
            text = str(model.tokenizer.decode(list(model.engine.partial().get(name, ())), skip_special_tokens=True))
            if not text.endswith(UNFINISHED) and text.startswith(shown):
                yield text.removeprefix(shown)
                shown = text

    def _tokens(self, messages: list[Message]) -> list[int]:
        text = self.rendering.conversation(messages, self.model.tokenizer, add_generation_prompt=True)
        return list(self.model.tokenizer(text + self.rendering.prefill, add_special_tokens=False)["input_ids"])


def chat(settings: Settings, note: Callable[[str], None], *, closing: ExitStack) -> None:
    """Answer what comes on the standard input, line by line, until it ends."""
    conversation = open_conversation(settings, note, closing=closing)
    note(f"{describe(settings)}; {HELP}")
    for line in _lines():
        if line == "/quit":
            return
        if line == "/new":
            conversation.clear()
        elif line.startswith("/"):
            note(HELP)
        elif line:
            _exchange(conversation, line, note, compare=settings.chat.compare)


def open_conversation(settings: Settings, note: Callable[[str], None], *, closing: ExitStack) -> Conversation:
    """A conversation with the model that the settings name. Raises UsageError for what cannot run."""
    asked = settings.chat
    if asked.compare and settings.model.adapter is None:
        raise UsageError("chat.compare=true: there is no adapter to compare the base model with")
    source, tokenizer = load_model_source(settings)
    config = load_config(source, trust_remote_code=settings.model.trust_remote_code)
    positions = positions_of(config) or asked.context_tokens + asked.max_tokens
    context = min(asked.context_tokens, positions - asked.max_tokens)
    if context < 1:
        raise UsageError(f"chat.max_tokens={asked.max_tokens}: the model has {positions} positions; choose fewer")
    sampling = answer_sampling(settings, temperature=asked.temperature, max_tokens=asked.max_tokens)
    StopStrings(sampling.stop, tokenizer)  # refuses what the tokenizer cannot write
    load = Load(1, context, asked.max_tokens)
    model = open_model(settings, source, tokenizer, load, note=note, closing=closing)
    system_prompt = system_prompt_of(settings, settings.data.system_prompt)
    return Conversation(model, evaluation_rendering(settings), sampling, system_prompt, context)


def _exchange(conversation: Conversation, text: str, note: Callable[[str], None], *, compare: bool) -> None:
    """Show the answer to `text`, with `compare` that of the base model before it, and keep the last one."""
    try:
        token_ids, left_out = conversation.prompt(text)
    except UsageError as error:
        note(str(error))
        return
    if left_out:
        note(f"left out the oldest {left_out} questions and their answers, for which the context has no room")
    model = conversation.model
    in_use = model.nothing if model.adapter is None else model.adapter
    adapters = {"base": model.nothing, "adapter": in_use}
    answer = ""
    for name in adapters if compare else ["adapter"]:
        if compare:
            print(f"[{name}]")
        answer = ""
        for piece in conversation.answer(token_ids, adapters[name]):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
    conversation.messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """The lines of the standard input; on a terminal with a prompt, and editing."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # input() edits lines and remembers them once this is imported

    readline.parse_and_bind("set editing-mode emacs")
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
