"""Rows of questions and answers from a source: which columns hold them, and which rows cannot be used.

readers.py reads the files; rendering and order are prompts.py's. Knows no tokenizer.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from actors.data.readers import BadRow, DataError, read_rows

PROMPT_COLUMNS = ("messages", "prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "ground_truth", "target", "solution", "label")
MEDIA = ("image", "images", "video", "videos", "audio")
SHAREGPT = (
    'the rows are ShareGPT\'s; rename "conversations" to "messages", "from" to "role" (of human: user, of gpt: '
    'assistant) and "value" to "content"'
)


@dataclass(frozen=True)
class Row:
    """One question: chat messages, the reference answer if there is one, and the row as it was read.

    `answers` holds all acceptable answers, `answer` first; `place` is where the row was read, for messages.
    """

    messages: tuple[Mapping[str, str], ...]
    answers: tuple[str, ...]
    task: str
    metadata: dict[str, object]
    place: str

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]

    @property
    def answer(self) -> str | None:
        return self.answers[0] if self.answers else None


@dataclass(frozen=True)
class Loaded:
    """All good rows of the source `name`, the columns they were read from, and the bad ones as `place: reason`."""

    name: str
    rows: list[Row]
    prompt_column: str
    answer_column: str | None
    bad: list[str]


def load_rows(
    source: str,
    *,
    name: str,
    task: Mapping[str, object],
    split: str,
    prompt_column: str | None,
    answer_column: str | None,
    system_prompt: str | None,
    max_bad_rows: int,
    seed: int,
) -> Loaded:
    """Read every row of `source`. Raises DataError if it cannot be read or holds over `max_bad_rows` bad rows.

    Rows carry the `name` of the source. `task` and `seed` are options of a reasoning-gym task, `split` is that of a
    dataset of the hub. Columns are those named, or the first of PROMPT_COLUMNS and ANSWER_COLUMNS. `system_prompt` goes
    before messages that have none.
    """
    raw = list(read_rows(source, task=task, split=split, seed=seed))
    if not raw:
        raise DataError(f"data.source: {source} is empty; give a file that holds rows")
    columns = list(dict.fromkeys(str(name) for _, row in raw if isinstance(row, dict) for name in row))
    prompts = _choose_column(prompt_column, PROMPT_COLUMNS, columns, key="data.prompt_column")
    if prompts is None:
        if "conversations" in columns:
            raise DataError(f"{source}: {SHAREGPT}")
        if columns:
            raise DataError(
                f"none of the columns {', '.join(PROMPT_COLUMNS)} is there, only {', '.join(columns)}; "
                "set data.prompt_column"
            )
    answers = _choose_column(answer_column, ANSWER_COLUMNS, columns, key="data.answer_column")
    rows, bad = [], []
    for place, row in raw:
        try:
            rows.append(_to_row(place, row, prompts or "", answers, task=name, system_prompt=system_prompt))
        except BadRow as error:
            bad.append(f"{place}: {error}")
    if len(bad) > max_bad_rows:
        shown = "\n  ".join(bad[:5])
        raise DataError(f"{len(bad)} bad rows, {max_bad_rows} allowed (data.max_bad_rows):\n  {shown}")
    if not rows:
        raise DataError(f"data.source: {source} holds no usable row")
    return Loaded(name, rows, prompts or "", answers, bad)


def _choose_column(asked: str | None, known: tuple[str, ...], columns: list[str], *, key: str) -> str | None:
    """The column that the user named, or the first of the `known` ones that is there."""
    if asked is not None and asked not in columns:
        raise DataError(f"{key}={asked}: there is no such column, there are {', '.join(columns)}")
    return asked or next((name for name in known if name in columns), None)


def _to_row(
    place: str, row: object, prompt_column: str, answer_column: str | None, *, task: str, system_prompt: str | None
) -> Row:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {type(row).__name__}")
    if media := next((name for name in MEDIA if row.get(name) not in (None, "", [])), None):
        raise BadRow(f"{media} is not read: models are given text only; leave the column out if the text is enough")
    messages = _messages(row.get(prompt_column), prompt_column)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    answers = _answers(row.get(answer_column), answer_column) if answer_column else ()
    metadata = {str(name): value for name, value in row.items() if _is_json(value)}
    return Row(tuple(messages), answers, task, metadata, place)


def _messages(value: object, column: str) -> list[dict[str, str]]:
    """Chat messages of a cell, which end before the assistant's last reply."""
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value.strip()}]
    if isinstance(value, list) and value:
        messages = [_message(message, column) for message in value]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            return messages
    raise BadRow(f"no {column}" if value in (None, "", []) else f"{column} is neither text nor chat messages")


def _message(message: object, column: str) -> dict[str, str]:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        raise BadRow(SHAREGPT)
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise BadRow(f"{column} holds a message without role and content")
    content = message["content"]
    if isinstance(content, list):
        raise BadRow(f"{column} holds a message of parts (images or texts); only a message whose content is text works")
    if not isinstance(content, str):
        raise BadRow(f"{column} holds a message whose content is no text but {type(content).__name__}")
    return {"role": str(message["role"]), "content": content}


def _answers(value: object, column: str) -> tuple[str, ...]:
    """The acceptable answers of a cell, the first of which is the reference answer."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(answer, dict | list) for answer in values):
        raise BadRow(f"{column} is neither text nor a number, nor a list of these")
    answers = tuple(_answer_text(answer) for answer in values if answer is not None and str(answer).strip())
    if not answers:
        raise BadRow(f"no {column}")
    return answers


def _answer_text(value: object) -> str:
    if isinstance(value, str) and "####" in value:  # GSM8K: the reasoning, then #### and the number
        return value.rsplit("####", 1)[1].strip()
    return str(value).strip()


def _is_json(value: object) -> bool:
    if dataclasses.is_dataclass(value):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
