"""Rewards for the structure of a completion: tags, JSON, a pattern, steps. Plain Python."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from rewards.correctness import folded, marked_answer
from rewards.sample import Sample

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
# What begins a step: a numbered line, a bullet, "Step 2:", or a word that says where in an argument one is.
STEP = re.compile(
    r"^\s*(?:\d+[.)]\s|[-*•]\s|#+\s|\**step\s+\d+)|\b(?:first|second|third|next|then|finally),",
    re.MULTILINE | re.IGNORECASE,
)


def xml_tags(sample: Sample, *, names: Sequence[str], outside_penalty: float = 0.0) -> float:
    """The share of the tags `<name>` and `</name>` of all `names` that the text has exactly once and in order, less
    `outside_penalty` for each character after the last closing tag; at least 0.
    """
    wanted = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    if not wanted:
        raise ValueError("xml_tags: names is empty")
    text, place, in_order = sample.completion, -1, 0
    for tag in wanted:
        if text.count(tag) == 1 and text.find(tag) > place:
            in_order, place = in_order + 1, text.find(tag)
    after = text.rpartition(wanted[-1])[2].strip() if wanted[-1] in text else ""
    return max(0.0, in_order / len(wanted) - outside_penalty * len(after))


def regex(sample: Sample, *, pattern: str, whole: bool = False) -> float:
    """1 if the regular expression is found in the text, or with `whole` matches all of it, else 0. A dot matches line
    ends, too. Raises ValueError for a pattern that is none.
    """
    compiled = _compiled(pattern)
    match = compiled.fullmatch(sample.completion.strip()) if whole else compiled.search(sample.completion)
    return float(match is not None)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex: pattern={pattern!r} is no regular expression: {error}") from error


def steps(sample: Sample, *, target: int = 3) -> float:
    """The number of steps that the text is divided into (STEP), over `target`, at most 1."""
    if target < 1:
        raise ValueError(f"steps: target={target} must be at least 1")
    return min(1.0, len(STEP.findall(sample.completion)) / target)


def json_schema(sample: Sample, *, schema: Mapping[str, object]) -> float:
    """1 if the answer is JSON that the schema accepts, 0.5 if it is other JSON, else 0. Raises ValueError for a schema
    that is none.
    """
    validator = _validator(json.dumps(schema))
    value = _json_of(sample.completion)
    if value is _NONE:
        return 0.0
    return 1.0 if validator.is_valid(value) else 0.5  # type: ignore[arg-type]


@functools.cache
def _validator(schema: str) -> "Validator":
    """The validator of a schema as JSON."""
    import jsonschema
    from jsonschema.validators import validator_for

    try:
        loaded = json.loads(schema)
        kind = validator_for(loaded)
        kind.check_schema(loaded)
    except (ValueError, TypeError, AttributeError, jsonschema.SchemaError) as error:
        raise ValueError(f"json_schema: schema={schema[:100]!r} is no JSON schema: {str(error)[:200]}") from error
    return kind(loaded)


def json_fields(sample: Sample, *, strict: bool = False) -> float | None:
    """The share of the reference's fields, a JSON object, that the answer's have with the same value; strict: 1 or 0
    only. Case and spacing of texts do not count. None if no reference is an object.
    """
    references = [value for answer in sample.answers if isinstance(value := _parsed(answer), dict) and value]
    if not references:
        return None
    answer = _json_of(sample.completion)
    best = max(_share_of_fields(reference, answer) for reference in references)
    return float(best == 1) if strict else best


def _share_of_fields(reference: Mapping[str, object], answer: object) -> float:
    if not isinstance(answer, dict):
        return 0.0
    same = [key for key, value in reference.items() if key in answer and _folded(answer[key]) == _folded(value)]
    return len(same) / len(reference)


def _folded(value: object) -> object:
    """The value with all texts in it without case and outer spaces. True and 1, which Python calls equal, differ."""
    if isinstance(value, bool):
        return str(value), "bool"
    if isinstance(value, str):
        return folded(value)
    if isinstance(value, dict):
        return {key: _folded(of_key) for key, of_key in value.items()}
    return [_folded(element) for element in value] if isinstance(value, list) else value


_NONE = object()  # no JSON; null is one


def _json_of(text: str) -> object:
    """The JSON that the text answers: what is marked as the answer, else in the last fence, else the whole text."""
    marked, fenced = marked_answer(text), FENCED.findall(text)
    if marked is not None:
        inner = FENCED.findall(marked)
        return _parsed(inner[-1] if inner else marked)
    return _parsed(fenced[-1] if fenced else text)


def _parsed(text: str) -> object:
    try:
        return cast(object, json.loads(text))
    except (ValueError, RecursionError):
        return _NONE
