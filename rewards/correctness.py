"""Rewards for a right answer: numbers, mathematics, text, and reasoning-gym's own scorers. Plain Python.

Each function takes `strict`: the answer must have the required form (inside <answer>, \\boxed{} or after ####, or be
the whole text). Without it, the last candidate anywhere in the text counts. Where the data has several acceptable
answers, one that matches is enough.
"""

import re
from collections.abc import Collection
from decimal import Decimal, InvalidOperation

from rewards.sample import Sample

# A letter that stands alone, A to H: where the text says that it is the answer, where it
# is written as options are ("C.", "(C)", "C:", or at the end of a line), and anywhere.
LETTER = r"(?<![\w'’])([A-H])(?![\w'’])"
SAID = re.compile(
    rf"(?i:\b(?:answer|choice|option|choose|chose|pick)\b)(?:\s+(?:is|the|option|would|be))*[\s:*(]*{LETTER}"
    rf"|{LETTER}\)?\s+is\s+(?:right|correct|the)\b"
)
AS_OPTION = re.compile(LETTER + r"(?=\s*(?:[).,;:*\]]|$))", re.MULTILINE)
ALONE = re.compile(LETTER)
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
    """The text as a number, if it is nothing else. A dollar sign, commas and a final full stop are ignored."""
    cleaned = text.strip().removesuffix(".").replace(",", "").replace("$", "").replace("−", "-")
    try:
        value = Decimal(cleaned)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text. A minus sign belongs to it unless a digit precedes the sign ("9-4")."""
    for match in reversed(list(NUMBER.finditer(text))):
        number, before = match.group(), text[: match.start()].rstrip()
        if number[0] in "+-" and before and (before[-1].isdigit() or before[-1] == ")"):
            number = number[1:]
        return plain_number(number)
    return None


def final_answer(text: str) -> str | None:
    """What the text answers, for comparing samples with each other: the marked answer, else the last number, as a
    number where it is one; None if there is neither."""
    marked = marked_answer(text)
    number = last_number(text) if marked is None else plain_number(marked)
    if number is not None:
        return f"{number.normalize():f}"
    return None if marked is None else folded(marked)


def numeric(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the answer's number is that of a reference, else 0; None without a numeric reference."""
    references = [number for answer in sample.answers if (number := plain_number(answer)) is not None]
    return _has_number(sample.completion, references, strict=strict) if references else None


def _has_number(completion: str, references: Collection[Decimal], *, strict: bool) -> float:
    marked = marked_answer(completion)
    candidate = completion if marked is None else marked
    number = plain_number(candidate) if strict else last_number(candidate)
    return float(number in references)


def math(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the answer equals a reference as mathematics (math-verify), else 0; None without a reference.

    Plain numbers are compared without math-verify.
    """
    scores = [_equals(sample.completion, answer, strict=strict) for answer in sample.answers if answer]
    return max(scores, default=None)


def _equals(completion: str, reference: str, *, strict: bool) -> float:
    marked = marked_answer(completion)
    number = plain_number(reference)
    if number is not None:
        candidate = completion if marked is None else marked
        if strict or plain_number(candidate) is not None or marked is None:
            return _has_number(completion, [number], strict=strict)
    if strict and marked is None:
        return 0.0
    from math_verify import parse, verify

    # Its own time-outs use signals and cannot stop C code; the deadline of the scoring process can. Its functions
    # accept None for no time-out, whatever their annotations say.
    expected = parse(f"${reference}$", parsing_timeout=None)  # type: ignore[arg-type]
    actual = parse(completion if marked is None else f"${marked}$", parsing_timeout=None)  # type: ignore[arg-type]
    return float(verify(expected, actual, timeout_seconds=None))  # type: ignore[arg-type]


def exact(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the text is a reference, else 0; lenient: the marked answer counts, and case and spacing do not."""
    if not sample.answers:
        return None
    if strict:
        return float(sample.completion.strip() in [answer.strip() for answer in sample.answers])
    marked = marked_answer(sample.completion)
    text = folded(sample.completion if marked is None else marked)
    return float(text in [folded(answer) for answer in sample.answers])


def choice(sample: Sample, *, strict: bool = False) -> float | None:
    """1 if the letter that was chosen (A to H) is a reference's, else 0; strict: the marked answer is the letter alone.

    It is the only one of the marked answer, as in "B", "(B)" or "B. Assault". Without a marked answer it is the last
    one that the text calls the answer ("the answer is B", "B is right"), else the last one that is written as options
    are, else the last one that stands alone. None if no reference has a letter.
    """
    references = {letters[0] for answer in sample.answers if (letters := _options(answer))}
    if not references:
        return None
    marked = marked_answer(sample.completion)
    if strict:
        return float((sample.completion if marked is None else marked).strip() in references)
    if marked is not None:
        letters = set(_options(marked))
        return float(len(letters) == 1 and letters <= references)
    said = [first or second for first, second in SAID.findall(sample.completion)] or _options(sample.completion)
    return float(bool(said) and said[-1] in references)


def _options(text: str) -> list[str]:
    return AS_OPTION.findall(text) or ALONE.findall(text)


def folded(text: str) -> str:
    """The text without case, and with single spaces."""
    return " ".join(text.casefold().split())


def gym(sample: Sample, *, strict: bool = False) -> float | None:
    """reasoning-gym's own score (0 to 1) of the marked answer, else of the whole text; strict: 1 or 0 only."""
    task = sample.metadata.get("metadata", {}).get("source_dataset")
    if task is None:
        return None
    from rewards.gym import score_answer

    marked = marked_answer(sample.completion)
    score = score_answer(task, sample.completion.strip() if marked is None else marked, sample.metadata)
    return float(score >= 1.0) if strict else score
