"""Demonstrations: answers as the model should write them, as scored groups of one trajectory each.

Knows tokenizers and rows, and loads neither; does not know what trains on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from actors.data.readers import DataError
from actors.data.sources import Row
from actors.types import Group, Score, Trajectory, Turn, VersionSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actors.data.rendering import Rendering

# Question, reasoning and answer of the built-in ones.
BUILT_IN = (
    (
        "A shelf holds 4 boxes with 6 pens each. Five pens are lent out. How many pens are left?",
        "4 boxes with 6 pens each hold 4 * 6 = 24 pens. Five are lent out, so 24 - 5 = 19 are left.",
        "19",
    ),
    ("What is 17 + 28?", "17 + 20 = 37, and 37 + 8 = 45.", "45"),
    (
        "A train leaves at 9:40 and arrives at 11:15. How many minutes does it travel?",
        "From 9:40 to 10:40 it is 60 minutes, and from 10:40 to 11:15 it is 35 more. 60 + 35 = 95.",
        "95",
    ),
    (
        "Mia has twice as many marbles as Tom. Together they have 36. How many does Mia have?",
        "If Tom has x marbles, Mia has 2x, and x + 2x = 36. So x = 12, and Mia has 2 * 12 = 24. Check: 24 + 12 = 36.",
        "24",
    ),
    (
        "A shirt costs 40 dollars. Its price falls by 25%. What does it cost now?",
        "25% of 40 is 10. 40 - 10 = 30.",
        "30",
    ),
    (
        "Which number comes next: 3, 6, 12, 24?",
        "Each number is twice the one before it: 3 * 2 = 6, 6 * 2 = 12, 12 * 2 = 24. So the next is 24 * 2 = 48.",
        "48",
    ),
    (
        "A rectangle is 7 cm wide and 3 cm high. How many centimeters is its perimeter?",
        "The perimeter is twice the width plus twice the height: 2 * 7 + 2 * 3 = 14 + 6 = 20.",
        "20",
    ),
    ("How many days are three weeks and four days?", "Three weeks have 3 * 7 = 21 days. 21 + 4 = 25.", "25"),
)
COLUMN = "demonstration"
WARMUP = "warmup"  # the source of the built-in ones
PROBE = "OKAY"  # an answer that no chat template has in it


@dataclass(frozen=True)
class Demonstrations:
    """Groups to train on, and how many more were left out because they are longer than an answer may be."""

    groups: list[Group]
    too_long: int


def built_in_rows(system_prompt: str | None) -> list[Row]:
    """The built-in demonstrations as rows, with the answer as it should be written in COLUMN."""
    system: list[Mapping[str, str]] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    rows = []
    for number, (question, reasoning, answer) in enumerate(BUILT_IN):
        text = f"<think>\n{reasoning}\n</think>\n<answer>{answer}</answer>"
        messages = (*system, {"role": "user", "content": question})
        rows.append(Row(messages, (answer,), WARMUP, {COLUMN: text}, f"built-in demonstration {number + 1}"))
    return rows


def demonstration_text(row: Row, column: str) -> str | None:
    """The demonstration of a row; None if it has none. Raises DataError if it is no text."""
    text = row.metadata.get(column)
    if text is not None and not isinstance(text, str):
        raise DataError(f"warmup.column={column}: {row.place} holds no text there but {type(text).__name__}")
    return (text or "").strip() or None


def make_demonstrations(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str,
    rendering: Rendering,
    end_ids: Iterable[int],
    max_prompt_tokens: int,
    max_tokens: int,
) -> Demonstrations:
    """The demonstrations of `rows`; each ends with the one of `end_ids` that the chat template ends an answer with.

    Raises DataError if no row has one, none is short enough, or one does not begin with the rendering's prefill.
    """
    pairs = [(row, text) for row in rows if (text := demonstration_text(row, column)) is not None]
    if not pairs:
        raise DataError(f"warmup.column={column}: no training row has a demonstration there")
    groups, end = [], end_of_answer(tokenizer, rendering, end_ids)
    prompts = rendering.render([row for row, _ in pairs], tokenizer)
    for prompt, (row, text) in zip(prompts, pairs, strict=True):
        if not text.startswith(rendering.prefill):
            raise DataError(
                f"{row.place}: the demonstration does not begin with {rendering.prefill!r} (sampling.prefill)"
            )
        written = text.removeprefix(rendering.prefill)
        tokens = [*cast("list[int]", tokenizer(written, add_special_tokens=False)["input_ids"]), end]
        if len(prompt.token_ids) > max_prompt_tokens or len(tokens) > max_tokens:
            continue
        count = len(tokens)
        spans = (VersionSpan(0, count),)
        trajectory = Trajectory(tuple(tokens), (Turn(True, count),), (0.0,) * count, text, "stop", spans)
        groups.append(Group(prompt, (trajectory,), "demonstration", scores=(Score(1.0),)))
    if not groups:
        raise DataError(
            f"all {len(pairs)} demonstrations are over sampling.max_tokens={max_tokens}, or their prompts over "
            f"data.max_prompt_tokens={max_prompt_tokens}"
        )
    return Demonstrations(groups, len(pairs) - len(groups))


def end_of_answer(tokenizer: PreTrainedTokenizerBase, rendering: Rendering, end_ids: Iterable[int]) -> int:
    """The one of `end_ids` with which the chat template ends an answer; if there is none, the tokenizer's own."""
    ends = sorted(end_ids)
    after = rendering.conversation(
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": PROBE}], tokenizer
    ).rpartition(PROBE)[2]
    following = cast("list[int]", tokenizer(after, add_special_tokens=False)["input_ids"])
    default = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    return next((token for token in following if token in ends), cast(int, default))
