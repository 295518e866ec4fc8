"""Instructions that a program can check, as in IFEval (https://arxiv.org/abs/2311.07911): how long an answer is, which
words and forms it has. Plain Python.

A row names its instructions by IFEval's ids in the column `instruction_id_list`, and their arguments in `kwargs`.
Our own reading of the definitions. Sentences are counted by their full stops, question and exclamation marks, where
IFEval's own program uses a trained splitter, and the language is that of rewards/text.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from rewards.errors import RewardError
from rewards.sample import Sample
from rewards.text import language

Arguments = Mapping[str, object]
Check = Callable[[str, Mapping[str, object]], bool]

SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def instructions(sample: Sample, *, strict: bool = False) -> float | None:
    """The share of the row's instructions that the completion follows; strict: 1 if it follows all, else 0.

    None for a row without instructions. Raises RewardError for an instruction that is not known.
    """
    ids = sample.metadata.get("instruction_id_list")
    if not isinstance(ids, list) or not ids:
        return None
    given = sample.metadata.get("kwargs") or [{}] * len(ids)
    if not isinstance(given, list) or len(given) != len(ids):
        raise RewardError("instructions: the columns instruction_id_list and kwargs differ in length")
    followed = [_follows(sample, str(name), arguments or {}) for name, arguments in zip(ids, given, strict=True)]
    return float(all(followed)) if strict else sum(followed) / len(followed)


def _follows(sample: Sample, name: str, arguments: Arguments) -> bool:
    text = sample.completion.strip()
    if not text:
        return False
    if name == "language:response_language":
        return language(replace(sample, completion=text), language=_text(name, arguments, "language")) in (1.0, None)
    if name not in CHECKS:
        raise RewardError(f"instructions: {name} is not known; there are {', '.join(CHECKS)}")
    try:
        return CHECKS[name](text, arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise RewardError(f"instructions: {name} has arguments that it cannot use ({arguments}): {error!r}") from error


def _text(name: str, arguments: Arguments, key: str) -> str:
    value = arguments.get(key)
    if not isinstance(value, str):
        raise RewardError(f"instructions: {name} needs {key}, it has {dict(arguments)}")
    return value


def _count(text: str, phrase: str) -> int:
    """How often the phrase is there, in any case, also inside of words."""
    return len(re.findall(re.escape(phrase), text, re.IGNORECASE))


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _compared(count: int, limit: object, relation: object) -> bool:
    """Whether a count is "at least", or "less than", a limit."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")
    return count >= int(str(limit)) if relation == "at least" else count < int(str(limit))


def _strings(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return [str(element) for element in value]


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def _nth_paragraph(text: str, arguments: Arguments) -> bool:
    paragraphs, nth = _paragraphs(text, r"\n\s*\n"), int(str(arguments["nth_paragraph"]))
    if len(paragraphs) != int(str(arguments["num_paragraphs"])) or not 1 <= nth <= len(paragraphs):
        return False
    first = re.search(r"\w+", paragraphs[nth - 1])
    return first is not None and first.group().casefold() == str(arguments["first_word"]).casefold()


def _highlights(text: str) -> int:
    return len(re.findall(r"\*\*[^*\n]*[^*\s][^*\n]*\*\*|(?<!\*)\*[^*\n]*[^*\s][^*\n]*\*(?!\*)", text))


def _is_json(text: str) -> bool:
    inner = re.fullmatch(r"```(?:json)?\s*\n(.*)```", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(inner[1] if inner else text)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    said = [part for i, part in enumerate(parts) if part or 0 < i < len(parts) - 1]  # but for empty ends
    return len(said) == 2 and all(said) and said[0] != said[1]


def _has_postscript(text: str, arguments: Arguments) -> bool:
    """The marker, with or without a space after its full stops."""
    marker = re.escape(str(arguments["postscript_marker"]).strip()).replace(r"\.", r"\.\s?")
    return re.search(marker, text, re.IGNORECASE) is not None


def _ends_with(text: str, arguments: Arguments) -> bool:
    return text.rstrip('" ').casefold().endswith(str(arguments["end_phrase"]).strip().rstrip('" ').casefold())


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, a: all(_count(text, word) for word in _strings(a["keywords"])),
    "keywords:frequency": lambda text, a: _compared(_count(text, str(a["keyword"])), a["frequency"], a["relation"]),
    "keywords:forbidden_words": lambda text, a: (
        not any(_has_word(text, word) for word in _strings(a["forbidden_words"]))
    ),
    "keywords:letter_frequency": lambda text, a: _compared(
        text.casefold().count(str(a["letter"]).casefold()), a["let_frequency"], a["let_relation"]
    ),
    "length_constraints:number_sentences": lambda text, a: _compared(
        max(1, len(SENTENCE_END.findall(text))), a["num_sentences"], a["relation"]
    ),
    "length_constraints:number_paragraphs": lambda text, a: (
        len(_paragraphs(text, r"\*\*\*")) == int(str(a["num_paragraphs"]))
    ),
    "length_constraints:number_words": lambda text, a: _compared(
        len(re.findall(r"\w+", text)), a["num_words"], a["relation"]
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[[^\[\]]+\]", text)) >= int(str(a["num_placeholders"]))
    ),
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": lambda text, a: (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*\S", text, re.MULTILINE)) == int(str(a["num_bullets"]))
    ),
    "detectable_format:constrained_response": lambda text, _a: any(choice in text for choice in CHOICES),
    "detectable_format:number_highlighted_sections": lambda text, a: _highlights(text) >= int(str(a["num_highlights"])),
    "detectable_format:multiple_sections": lambda text, a: (
        len(re.findall(rf"{re.escape(str(a['section_spliter']))}\s*\d+", text)) >= int(str(a["num_sections"]))
    ),
    "detectable_format:json_format": lambda text, _a: _is_json(text),
    "detectable_format:title": lambda text, _a: re.search(r"<<[^<>\n]*[^<>\s][^<>\n]*>>", text) is not None,
    "combination:two_responses": lambda text, _a: _two_responses(text),
    "combination:repeat_prompt": lambda text, a: text.casefold().startswith(
        str(a["prompt_to_repeat"]).strip().casefold()
    ),
    "startend:end_checker": _ends_with,
    "startend:quotation": lambda text, _a: len(text) > 1 and text[0] == text[-1] == '"',
    "change_case:english_capital": lambda text, _a: text.isupper(),
    "change_case:english_lowercase": lambda text, _a: text.islower(),
    "change_case:capital_word_frequency": lambda text, a: _compared(
        sum(word.isupper() for word in re.findall(r"\w+", text)), a["capital_frequency"], a["capital_relation"]
    ),
    "punctuation:no_comma": lambda text, _a: "," not in text,
}
