"""Answers to the same held-out questions before, midway and after: what training changed, to read. Knows files."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from conf.errors import disk_errors
from epiphany.report.metrics import Row
from epiphany.report.run_folder import Layout

# How many questions are shown of each outcome, in this order: where answers are checked, and where only rewards tell.
CHECKED = {"won": 24, "lost": 12, "right": 6, "wrong": 6}
REWARDED = {"rose": 24, "fell": 12, "stayed": 12}
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
    middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    chosen = list(dict.fromkeys([steps[0], middle, steps[-1]]))
    tables = [_greedy(folder, step) for step in chosen]
    is_checked = any(row["lenient"] is not None for row in tables[-1].values())
    shown = CHECKED if is_checked else REWARDED
    outcomes: dict[str, list[int]] = {name: [] for name in shown}
    for ordinal, after in tables[-1].items():
        outcome = _outcome(tables[0].get(ordinal), after, key="lenient" if is_checked else "reward")
        if outcome is not None:
            outcomes[outcome].append(ordinal)
    questions = [
        {
            "outcome": name,
            "question": clipped(tables[-1][ordinal]["question"]),
            "reference": clipped(tables[-1][ordinal]["reference"] or ""),
            "answers": [_shown(table.get(ordinal)) for table in tables],
        }
        for name, ordinals in outcomes.items()
        for ordinal in ordinals[: shown[name]]
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


def _outcome(before: Row | None, after: Row, *, key: str) -> str | None:
    """What became of a question, by whether its answer is right ("lenient") or by its reward; None where one of the two
    answers was not asked for or could not be scored.
    """
    if before is None or before[key] is None or after[key] is None:
        return None
    first, last = before[key], after[key]
    if key == "reward":
        return "rose" if last > first else "fell" if last < first else "stayed"
    if (first >= 1) != (last >= 1):
        return "won" if last >= 1 else "lost"
    return "right" if last >= 1 else "wrong"


def _shown(row: Row | None) -> dict[str, object] | None:
    if row is None:
        return None
    return {
        "text": clipped(row["completion"]),
        "right": row["lenient"],
        "reward": row["reward"],
        "error": row["error"],
    }
