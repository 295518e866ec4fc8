"""What a chat template puts between an answer and the next one, found by rendering.

Tokens that were sampled are never decoded and tokenized again: what comes from outside is tokenized alone, between the
separators of the template, and appended. A template that would drop or change earlier answers (as some drop reasoning)
does so for its own renderings; here the sampled tokens stay. Knows tokenizers; knows no environment.
"""

from collections.abc import Mapping, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from actors.data.readers import DataError
from actors.data.rendering import Rendering

Message = Mapping[str, object]

MARK = "Epiphany-marks-an-answer"  # stands for the sampled answer, whose text no template may depend on
CALL_ID = "epiphany0"  # nine characters, as some templates ask for
TOOL = "tool"  # the role of a message that holds what a tool gave


def continuation(
    rendering: Rendering,
    tokenizer: PreTrainedTokenizerBase,
    *,
    before: Sequence[Message],
    behind: Sequence[Message],
) -> str:
    """The text behind an answer to the messages `before`, up to where the next answer begins: the end of its turn, and
    the messages `behind`.

    Raises DataError if the template refuses them or writes no answers.
    """
    answer: Message = {"role": "assistant", "content": MARK}
    calls = [_call(message) for message in behind if message["role"] == TOOL]
    try:
        return _without_calls(rendering, tokenizer, [*before, answer], behind)
    except DataError:
        if not calls:
            raise
        # Some templates accept what a tool gave only behind a call of it.
        return _with_calls(rendering, tokenizer, before, {**answer, "tool_calls": calls}, [*map(_with_id, behind)])


def appended_tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, last_sampled: int) -> tuple[int, ...]:
    """The tokens of a continuation, to append behind an answer whose last token is `last_sampled`: without the one that
    ends the turn if the model has sampled it.
    """
    rest = text.removeprefix(str(tokenizer.decode([last_sampled])))
    return tuple(cast("list[int]", tokenizer(rest, add_special_tokens=False)["input_ids"]))


def _without_calls(
    rendering: Rendering, tokenizer: PreTrainedTokenizerBase, answered: Sequence[Message], behind: Sequence[Message]
) -> str:
    whole = rendering.conversation([*answered, *behind], tokenizer, add_generation_prompt=True)
    if MARK not in whole:
        raise DataError("the model's chat template leaves out earlier answers; set model.chat_template")
    return whole.rsplit(MARK, 1)[1]


def _with_calls(
    rendering: Rendering,
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[Message],
    answer: Message,
    behind: Sequence[Message],
) -> str:
    """The same, of an answer whose calls the template writes itself: they are taken out again, because a sampled answer
    contains its calls.
    """
    plain = rendering.conversation([*before, {"role": "assistant", "content": MARK}], tokenizer)
    calling = rendering.conversation([*before, answer], tokenizer)
    whole = rendering.conversation([*before, answer, *behind], tokenizer, add_generation_prompt=True)
    opening, end = plain.rsplit(MARK, 1) if MARK in plain else ("", "")
    calling, whole = (text.rsplit(MARK, 1)[-1].removeprefix(opening) for text in (calling, whole))
    calls = calling.removesuffix(end)
    if not end or not whole.startswith(calls):
        raise DataError(
            "the model's chat template does not say where a call ends and what a tool gave begins; set "
            "model.chat_template"
        )
    return whole.removeprefix(calls)


def _call(message: Message) -> Mapping[str, object]:
    function = {"name": message.get("name", TOOL), "arguments": {}}
    return {"id": CALL_ID, "type": "function", "function": function}


def _with_id(message: Message) -> Message:
    return {**message, "tool_call_id": CALL_ID} if message["role"] == TOOL else message
