"""Answers to the same held-out questions before, midway and after: what training changed, to read. Knows files."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from conf.errors import disk_errors
from epiphany.report.metrics import Row
from epiphany.report.run_folder import Layout

# How many questions are shown of each outcome, in this order.
SHOWN = {"won": 24, "lost": 12, "right": 6, "wrong": 6}
MAX_TEXT = 8_000  # characters of one text


def clipped(text: str, most: int = MAX_TEXT) -> str:
    """The text, without its middle if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    head = most * 3 // 4
    return f"{text[:head]}\n[... {len(text) - most:,} characters are left out ...]\n{text[head - most :]}"


def side_by_side(folder: Layout, evaluations: Sequence[Row]) -> dict[str, object] | None:
    """Greedy answers at the first, the middle and the last evaluation under the last one's reward; None before there
    are two.
    """
    if not evaluations:
        return None
    steps = [record["step"] for record in evaluations if record.get("reward") == evaluations[-1].get("reward")]
    steps = [step for step in dict.fromkeys(steps) if _file(folder, step).is_file()]
    if len(steps) < 2:
        return None
    middle = min(steps, key=lambda step: abs(step - steps[-1] / 2))
    chosen = list(dict.fromkeys([steps[0], middle, steps[-1]]))
    tables = [_greedy(folder, step) for step in chosen]
    outcomes: dict[str, list[int]] = {name: [] for name in SHOWN}
    for ordinal, after in tables[-1].items():
        if (before := tables[0].get(ordinal)) is not None:
            outcomes[_outcome(before, after)].append(ordinal)
    questions = [
        {
            "outcome": name,
            "question": clipped(tables[-1][ordinal]["question"]),
            "reference": clipped(tables[-1][ordinal]["reference"] or ""),
            "answers": [_shown(table.get(ordinal)) for table in tables],
        }
        for name, ordinals in outcomes.items()
        for ordinal in ordinals[: SHOWN[name]]
    ]
    return {
        "steps": chosen,
        "counts": {name: len(ordinals) for name, ordinals in outcomes.items()},
        "questions": questions,
    }


def _file(folder: Layout, step: int) -> Path:
    return folder.evaluation_rows / f"step-{step:06d}.parquet"


def _greedy(folder: Layout, step: int) -> dict[int, Row]:
    with disk_errors(folder.path):
        rows = pq.read_table(_file(folder, step)).to_pylist()
    return {row["ordinal"]: row for row in rows if row["temperature"] == 0 and row["sample"] == 0}


def _score(row: Row) -> float:
    """1 or 0 for right or wrong if answers are checked, else the reward; below all of them if it has no score."""
    value = row["lenient"] if row["lenient"] is not None else row["reward"]
    return float("-inf") if value is None else value


def _outcome(before: Row, after: Row) -> str:
    first, last = _score(before), _score(after)
    if first != last:
        return "won" if last > first else "lost"
    return "right" if last >= 1 else "wrong"


def _shown(row: Row | None) -> dict[str, object] | None:
    if row is None:
        return None
    return {
        "text": clipped(row["completion"]),
        "right": row["lenient"],
        "reward": row["reward"],
        "error": row["error"],
        "characters": len(row["completion"]),
    }
