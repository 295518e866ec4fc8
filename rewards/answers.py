"""Is the answer right? Numbers, mathematics, text, and reasoning-gym's own scorers.

Each function takes `strict`: the answer must stand in the demanded form (inside <answer>, \\boxed{} or behind ####,
or be the whole text); otherwise the last candidate anywhere in the text counts. Plain Python.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from rewards.sample import Sample

NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
HASHES = re.compile(r"####\s*(.+)")


def marked_answer(text: str) -> str | None:
    """The last answer that the text marks as such: <answer>...</answer>, else \\boxed{...}, else #### ..."""
    if tags := TAG.findall(text):
        return tags[-1].strip()
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if hashes := HASHES.findall(text):
        return hashes[-1].strip()
    return None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return None


def plain_number(text: str) -> Decimal | None:
    """The text as a number, if it is one and nothing else (a $ before it, commas and a full stop behind it allowed)."""
    cleaned = text.strip().removesuffix(".").replace(",", "").replace("$", "").replace("−", "-")
    try:
        value = Decimal(cleaned)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text. A minus sign belongs to it unless a digit stands right before ("9-4")."""
    for match in reversed(list(NUMBER.finditer(text))):
        found, before = match.group(), text[: match.start()].rstrip()
        if found[0] in "+-" and before and (before[-1].isdigit() or before[-1] == ")"):
            found = found[1:]
        return plain_number(found)
    return None


def numeric(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the answer's number is the reference's number, else 0; None without a numeric reference."""
    gold = plain_number(sample.answer or "")
    if gold is None:
        return None
    marked = marked_answer(sample.completion)
    if marked is not None:
        found = plain_number(marked) if strict else last_number(marked)
    else:
        found = plain_number(sample.completion) if strict else last_number(sample.completion)
    return float(found == gold)


def math(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the answer equals the reference as mathematics (math-verify), else 0; plain numbers take a fast path."""
    if not sample.answer:
        return None
    marked = marked_answer(sample.completion)
    if plain_number(sample.answer) is not None:
        candidate = sample.completion if marked is None else marked
        if strict or plain_number(candidate) is not None or marked is None:
            return numeric(sample, strict=strict)
    if strict and marked is None:
        return 0.0
    import math_verify

    # Its own time-outs use signals and cannot stop C code; the deadline of the scoring child can.
    parse: Any = math_verify.parse
    gold = parse(f"${sample.answer}$", parsing_timeout=None)
    found = parse(sample.completion if marked is None else f"${marked}$", parsing_timeout=None)
    return float(math_verify.verify(gold, found, timeout_seconds=None))


def exact(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the text is the reference, else 0; lenient: the marked answer counts, and case and spacing do not."""
    if sample.answer is None:
        return None
    if strict:
        return float(sample.completion.strip() == sample.answer.strip())
    found = marked_answer(sample.completion)
    return float(_folded(sample.completion if found is None else found) == _folded(sample.answer))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def gym(sample: Sample, *, strict: bool = False) -> float | None:
    """reasoning-gym's own score (0 to 1) of the marked answer or else of the whole text; strict: full score only."""
    task = sample.metadata.get("metadata", {}).get("source_dataset")
    if task is None:
        return None
    from rewards.gym import score_answer

    found = marked_answer(sample.completion)
    score = score_answer(task, sample.completion.strip() if found is None else found, sample.metadata)
    return float(score >= 1.0) if strict else score
