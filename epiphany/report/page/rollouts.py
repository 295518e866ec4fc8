"""Rollouts to read: some groups of some steps with all their answers, token by token. Knows files and tokenizers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.compute as pc
import pyarrow.parquet as pq

from conf.errors import disk_errors
from epiphany.report.metrics import Row
from epiphany.report.page.answers import clipped
from epiphany.report.run_folder import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_STEPS, MAX_GROUPS, MAX_ANSWERS = 8, 4, 8
MAX_TOKENS = 2_000  # of one answer
ALL_TOKENS = 120_000  # of all answers
DECIMALS = 4  # of a token's numbers


def rollouts(folder: Layout, tokenizer: "PreTrainedTokenizerBase | None") -> list[dict[str, object]]:
    """The first groups of up to MAX_STEPS steps, evenly spread. Without a tokenizer, answers have no tokens."""
    files = _spread(sorted(folder.completions.glob("step-*.parquet")))
    steps = [_groups(folder, file) for file in files]
    count = sum(min(len(group), MAX_ANSWERS) for _, groups in steps for group in groups)
    most = min(MAX_TOKENS, ALL_TOKENS // max(1, count))
    return [
        {
            "step": int(file.stem.removeprefix("step-")),
            "of_groups": of_groups,
            "groups": [_group(group, tokenizer, most) for group in groups],
        }
        for file, (of_groups, groups) in zip(files, steps, strict=True)
    ]


def _spread(files: Sequence[Path]) -> list[Path]:
    """At most MAX_STEPS of the files, the first and the last among them."""
    count = min(MAX_STEPS, len(files))
    return [files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)]


def _groups(folder: Layout, file: Path) -> tuple[int, list[list[Row]]]:
    """How many groups a step has, and the rows of the first ones."""
    with disk_errors(folder.path):
        table = pq.read_table(file)
    ordinals = table.column("ordinal")
    known = ordinals.unique()
    chosen = pc.is_in(ordinals, value_set=known.slice(0, MAX_GROUPS))  # type: ignore[attr-defined]
    groups: dict[int, list[Row]] = {}
    for row in table.filter(chosen).to_pylist():
        groups.setdefault(row["ordinal"], []).append(row)
    return len(known), list(groups.values())


def _group(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase | None", most: int) -> dict[str, object]:
    first = rows[0]
    return {
        "ordinal": first["ordinal"],
        "source": first["task"],
        "question": clipped(first["question"]),
        "reference": clipped(first["reference"] or ""),
        "of_answers": len(rows),
        "answers": [_answer(row, tokenizer, most) for row in rows[:MAX_ANSWERS]],
    }


def _answer(row: Row, tokenizer: "PreTrainedTokenizerBase | None", most: int) -> dict[str, object]:
    token_ids = row["token_ids"][row["prompt_length"] :]
    answer = {
        "sample": row["sample"],
        "reward": row["reward"],
        "terms": dict(row["reward_terms"]),
        "error": row["error"],
        "finish_reason": row["finish_reason"],
        "tokens": len(token_ids),
        "versions": [span["version"] for span in row["version_spans"]],
    }
    pieces = None if tokenizer is None else pieces_of(token_ids, tokenizer)
    if pieces is None:
        return {**answer, "text": clipped(row["text"])}
    head = tail = len(pieces)
    if len(pieces) > most:
        head = most * 3 // 4
        tail = len(pieces) - (most - head)
    sampled, policy = _by_token(row, row["behavior_logprobs"]), _by_token(row, row.get("policy_logprobs"))
    return {
        **answer,
        "left_out": tail - head,
        "head": head,
        "pieces": [*pieces[:head], *pieces[tail:]],
        "logprobs": [*sampled[:head], *sampled[tail:]],
        "policy_logprobs": [*policy[:head], *policy[tail:]],
    }


def _by_token(row: Row, values: Sequence[float | None] | None) -> list[float | None]:
    """The values of the sampled tokens for every token of the answer: None for tokens that were given, and for values
    that the learner did not compute.
    """
    of_sampled: Iterator[float | None] = iter(values or ())
    return [
        None if not turn["sampled"] or (value := next(of_sampled, None)) is None else round(value, DECIMALS)
        for turn in row["turns"]
        for _ in range(turn["length"])
    ]


def pieces_of(token_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[str] | None:
    """The text of each token. A character of several tokens is the last one's; what is left of one at the end belongs
    to the last token.

    None if the tokenizer is one of Python's, which cannot tell.
    """
    from tokenizers.decoders import DecodeStream

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    stream, pieces = DecodeStream(skip_special_tokens=False), []
    for token_id in token_ids:
        try:
            pieces.append(stream.step(backend, token_id) or "")
        except Exception:  # noqa: BLE001 - of its own kind, for bytes that are no text in any order
            stream = DecodeStream(skip_special_tokens=False)
            pieces.append(backend.decode([token_id], skip_special_tokens=False))
    whole, said = backend.decode(list(token_ids), skip_special_tokens=False), "".join(pieces)
    if pieces and whole.startswith(said):
        pieces[-1] += whole[len(said) :]
    return pieces
