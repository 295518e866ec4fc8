"""Rows of questions and answers: JSONL, CSV, Parquet, Hugging Face datasets and reasoning-gym.

Yields plain rows and says where each came from; rendering and order are prompts.py's. Knows no tokenizer.
"""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from conf.errors import UsageError
from rewards.gym import reasoning_gym

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "ground_truth", "target", "solution", "label")
GYM = "reasoning_gym:"


class DataError(UsageError):
    """Data that cannot be used; names the file, the line and what to change."""


@dataclass(frozen=True)
class Row:
    """One question: chat messages, the reference answer if there is one, and the row as it was read."""

    messages: tuple[Mapping[str, str], ...]
    answer: str | None
    task: str
    metadata: dict[str, Any]

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Loaded:
    """All good rows, the columns they were read from, and the bad ones as `where: what`."""

    rows: list[Row]
    prompt_column: str
    answer_column: str | None
    bad: list[str]


def load_rows(
    source: str, *, task: Mapping[str, Any], split: str, prompt_column: str | None, answer_column: str | None,
    system_prompt: str | None, max_bad_rows: int, seed: int,
) -> Loaded:  # fmt: skip
    """Read every row of `source`. Raises DataError if it cannot be read or holds over `max_bad_rows` bad rows."""
    raw = list(_read(source, dict(task), split, seed))
    columns = list(dict.fromkeys(name for _, row in raw if isinstance(row, dict) for name in row))
    if not raw:
        raise DataError(f"data.source: {source} is empty")
    prompt_column = _pick(prompt_column, PROMPT_COLUMNS, columns, "data.prompt_column", required=True)
    answer_column = _pick(answer_column, ANSWER_COLUMNS, columns, "data.answer_column", required=False)
    name = source.removeprefix(GYM) if source.startswith(GYM) else Path(source).stem
    rows, bad = [], []
    for where, row in raw:
        try:
            rows.append(_to_row(row, str(prompt_column), answer_column, name, system_prompt))
        except _BadRow as error:
            bad.append(f"{where}: {error}")
    if len(bad) > max_bad_rows:
        shown = "\n  ".join(bad[:5])
        raise DataError(f"{len(bad)} bad rows, {max_bad_rows} allowed (data.max_bad_rows):\n  {shown}")
    if not rows:
        raise DataError(f"data.source: {source} holds no usable row")
    return Loaded(rows, str(prompt_column), answer_column, bad)


class _BadRow(Exception):
    """Why a row cannot be used."""


def _read(source: str, task: dict[str, Any], split: str, seed: int) -> Iterator[tuple[str, Any]]:
    file = Path(source).expanduser()
    if source.startswith(GYM):
        yield from _read_gym(source.removeprefix(GYM), task, seed)
    elif file.is_file():
        readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
        if file.suffix not in readers:
            raise DataError(f"data.source: {file} is none of {', '.join(readers)}")
        yield from readers[file.suffix](file)
    elif file.suffix in (".jsonl", ".json", ".csv", ".parquet") or source.startswith((".", "/", "~")):
        raise DataError(f"data.source: no file {file}")
    else:
        yield from _read_hub(source, split)


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except ValueError as error:
                    yield f"{file}:{number}", _BadRow(f"not JSON ({error})")


def _read_csv(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            surplus = row.pop(None, None)  # type: ignore[call-overload]
            yield where, _BadRow(f"{len(surplus)} cells too many") if surplus else row


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in pq.ParquetFile(file).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{file}: row {number}", row


def _read_gym(task: str, options: dict[str, Any], seed: int) -> Iterator[tuple[str, Any]]:
    try:
        dataset = reasoning_gym().create_dataset(task, **{"seed": seed, **options})
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"data.source: reasoning-gym refuses {task} with {options}: {error}") from error
    for i in range(len(dataset)):
        entry = dict(dataset[i])
        yield f"{GYM}{task}: row {i + 1}", {**entry, "metadata": {**entry["metadata"], "source_dataset": task}}


def _read_hub(source: str, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"data.source: {source} is no file here and not to be had from the hub ({reason})") from error
    for number, row in enumerate(dataset, 1):
        yield f"{source}: row {number}", row


def _pick(given: str | None, known: tuple[str, ...], columns: list[str], key: str, *, required: bool) -> str | None:
    if given is not None and given not in columns:
        raise DataError(f"{key}={given}: there is no such column, there are {', '.join(columns)}")
    found = given or next((name for name in known if name in columns), None)
    if found is None and required:
        raise DataError(f"none of the columns {', '.join(known)} is there, only {', '.join(columns)}; set {key}")
    return found


def _to_row(row: Any, prompt_column: str, answer_column: str | None, task: str, system_prompt: str | None) -> Row:
    if isinstance(row, _BadRow):
        raise row
    if not isinstance(row, dict):
        raise _BadRow(f"not an object but {type(row).__name__}")
    messages = _messages(row.get(prompt_column), prompt_column)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    answer = row.get(answer_column) if answer_column else None
    if answer_column and (answer is None or (isinstance(answer, str) and not answer.strip())):
        raise _BadRow(f"no {answer_column}")
    if isinstance(answer, str) and "####" in answer:  # GSM8K: the reasoning, then #### and the number
        answer = answer.rsplit("####", 1)[1]
    kept = {name: value for name, value in row.items() if _is_json(value)}
    return Row(tuple(messages), None if answer is None else str(answer).strip(), task, kept)


def _messages(value: Any, column: str) -> list[dict[str, str]]:
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value.strip()}]
    if isinstance(value, list) and value:
        for message in value:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise _BadRow(f"{column} holds a message without role and content")
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in value]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            return messages
    raise _BadRow(f"no {column}" if value in (None, "", []) else f"{column} is neither text nor chat messages")


def _is_json(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
