"""Tool calls in a model's answer: read strictly, and never evaluated.

Models write calls as their chat template taught them to. An answer that begins a call and does not end it, or whose
arguments are no JSON, raises CallError, whose sentence is for the model: it may try again. Knows text only.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_CALLS = 32  # in one answer
MAX_CHARACTERS = 100_000  # of one call


class CallError(ValueError):
    """A call that cannot be carried out; the message tells the model why."""


@dataclass(frozen=True)
class Call:
    """The tool `name` with named `arguments`. `is_text`: they were written as text, whatever their types are."""

    name: str
    arguments: Mapping[str, Any]
    is_text: bool = False


def parse_calls(text: str, form: str) -> list[Call]:
    """The calls in an answer, in their order; none if it has none. `form` is a key of FORMS. Raises CallError."""
    calls = FORMS[form](text)
    if len(calls) > MAX_CALLS:
        raise CallError(f"{len(calls)} calls in one answer: {MAX_CALLS} at most are carried out")
    return calls


def form_of(template: str) -> str | None:
    """The form in which a chat template tells models to write calls; None if it does not know tools."""
    if "tools" not in template:
        return None
    if "<function=" in template:
        return "qwen_xml"
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    return "llama3" if '"parameters"' in template else None


def _tagged(tag: str) -> Callable[[str], list[Call]]:
    """JSON objects between <tag> and </tag>."""
    return lambda text: [_from_json(body) for body in _between(text, f"<{tag}>", f"</{tag}>")]


def _qwen_xml(text: str) -> list[Call]:
    """<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>; values are text."""
    calls = []
    for body in _between(text, "<tool_call>", "</tool_call>"):
        function = re.fullmatch(r"\s*<function=([^>\s]+)>(.*)</function>\s*", body, re.DOTALL)
        if function is None:
            raise CallError("a <tool_call> must hold <function=name>...</function> and nothing else")
        name, rest = function.groups()
        arguments: dict[str, str] = {}
        while rest.strip():
            parameter = re.match(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", rest, re.DOTALL)
            if parameter is None:
                raise CallError(f"the function {name} may hold <parameter=name>...</parameter> only")
            key, value = parameter.groups()
            if key in arguments:
                raise CallError(f"the parameter {key} of {name} is given twice")
            arguments[key] = value
            rest = rest[parameter.end() :]
        calls.append(Call(name, arguments, is_text=True))
    return calls


def _llama3(text: str) -> list[Call]:
    """The whole answer is {"name": ..., "parameters": {...}}, perhaps behind <|python_tag|>."""
    body = text.removesuffix("<|eom_id|>").removesuffix("<|eot_id|>").strip().removeprefix("<|python_tag|>").strip()
    return [_from_json(body, arguments="parameters")] if body.startswith("{") else []


def _mistral(text: str) -> list[Call]:
    """[TOOL_CALLS] with a list of objects, or with name[ARGS]{...} for each call."""
    _, mark, body = text.partition("[TOOL_CALLS]")
    body = body.strip().removesuffix("</s>").strip()
    if not mark:
        return []
    if not body.startswith("["):
        parts = [part.strip() for part in body.split("[TOOL_CALLS]")]
        return [_from_parts(*part.partition("[ARGS]")) for part in parts]
    calls = _json(body)
    if not isinstance(calls, list):
        raise CallError("[TOOL_CALLS] must be followed by a list of calls")
    return [_from_object(call) for call in calls]


FORMS: dict[str, Callable[[str], list[Call]]] = {
    "hermes": _tagged("tool_call"),
    "qwen_xml": _qwen_xml,
    "llama3": _llama3,
    "mistral": _mistral,
    "tags": _tagged("tool"),
}


def _between(text: str, start: str, end: str) -> list[str]:
    """What stands between each `start` and its `end`. Raises CallError if one has none, or holds another start."""
    bodies = []
    while start in text:
        _, _, text = text.partition(start)
        body, mark, text = text.partition(end)
        if not mark or start in body:
            raise CallError(f"a {start} without its {end}")
        bodies.append(body)
    return bodies


def _from_parts(name: str, mark: str, arguments: str) -> Call:
    if not mark:
        raise CallError("a call must be name[ARGS]{...}")
    return _from_object({"name": name, "arguments": _json(arguments)})


def _from_json(text: str, *, arguments: str = "arguments") -> Call:
    return _from_object(_json(text), arguments=arguments)


def _from_object(call: object, *, arguments: str = "arguments") -> Call:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get(arguments), dict):
        raise CallError(f'a call must be an object with a "name" and an object of "{arguments}"')
    surplus = sorted(call.keys() - {"name", arguments, "id", "type"})
    if surplus:
        raise CallError(f"a call must not have {', '.join(map(repr, surplus))}")
    return Call(call["name"], call[arguments])


def _json(text: str) -> object:
    if len(text) > MAX_CHARACTERS:
        raise CallError(f"a call of {len(text)} characters: {MAX_CHARACTERS} are allowed")
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CallError(f"the call is not valid JSON: {' '.join(str(error).split())[:200]}") from error


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("a name comes twice in one object")
    return dict(pairs)
