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
    files = sorted(folder.completions.glob("step-*.parquet"))
    last = max(1, min(MAX_STEPS, len(files)) - 1)
    files = (
        [files[i] for i in dict.fromkeys(round(k * (len(files) - 1) / last) for k in range(last + 1))] if files else []
    )
    chosen = [_groups(folder, file) for file in files]
    count = sum(min(len(group), MAX_ANSWERS) for groups in chosen for group in groups)
    most = min(MAX_TOKENS, ALL_TOKENS // max(1, count))
    return [
        {
            "step": int(file.stem.removeprefix("step-")),
            "of_groups": _group_count(folder, file),
            "groups": [_group(group, tokenizer, most) for group in groups],
        }
        for file, groups in zip(files, chosen, strict=True)
    ]


def _group_count(folder: Layout, file: Path) -> int:
    """How many groups a step has."""
    with disk_errors(folder.path):
        return len(pq.read_table(file, columns=["ordinal"]).column("ordinal").unique())


def _groups(folder: Layout, file: Path) -> list[list[Row]]:
    """The step's first groups, and no others of its rows."""
    with disk_errors(folder.path):
        table = pq.read_table(file)
    ordinals = table.column("ordinal")
    first = ordinals.unique().slice(0, MAX_GROUPS)
    groups: dict[int, list[Row]] = {}
    for row in table.filter(pc.is_in(ordinals, value_set=first)).to_pylist():  # type: ignore[attr-defined]
        groups.setdefault(row["ordinal"], []).append(row)
    return list(groups.values())


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
    head = min(len(pieces), most * 3 // 4 if len(pieces) > most else most)
    tail = len(pieces) - (most - head) if len(pieces) > most else len(pieces)
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
