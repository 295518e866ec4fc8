"""The tools of an environment: its public methods, whose type hints and docstrings become the schema that a model sees.

Knows classes and JSON Schema; carries out no call. Schemas are made as transformers makes them for its templates.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException, get_json_schema

from actors.environments.calls import Call, CallError
from actors.environments.errors import EnvironmentRefused

# Public methods that are no tools: they belong to the episode.
OF_THE_EPISODE = frozenset({"reset", "step", "reward", "get_reward", "close"})


def tool_schemas(environment: type) -> list[dict[str, Any]]:
    """A schema for each tool of the class, as chat templates take them (`tools=`).

    Raises EnvironmentRefused for a tool whose arguments have no types or no descriptions.
    """
    return [_schema(environment.__name__, name, method) for name, method in _tools(environment)]


def _tools(environment: type) -> list[tuple[str, Callable[..., object]]]:
    """In the order of their definition, those of base classes first."""
    names: dict[str, None] = {}
    for owner in reversed(environment.__mro__[:-1]):
        names |= {name: None for name, value in vars(owner).items() if inspect.isfunction(value)}
    public = [name for name in names if not name.startswith("_") and name not in OF_THE_EPISODE]
    return [(name, getattr(environment, name)) for name in public]


def _schema(environment: str, name: str, method: Callable[..., object]) -> dict[str, Any]:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise EnvironmentRefused(f"the tool {environment}.{name} takes {parameter}: name each argument it takes")
    try:
        schema = get_json_schema(_without_self(method, parameters))
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise EnvironmentRefused(
            f"the tool {environment}.{name} cannot be described to a model: {' '.join(str(error).split())}. It needs a "
            "docstring with a line for each argument under `Args:`, and a type for each"
        ) from error
    schema["function"]["parameters"]["additionalProperties"] = False
    return schema


def _without_self(method: Callable[..., object], parameters: Sequence[inspect.Parameter]) -> Callable[..., object]:
    """A function with the method's name, docstring, types and parameters but `self`."""

    def tool() -> None: ...

    tool.__name__, tool.__doc__ = method.__name__, inspect.getdoc(method)
    tool.__annotations__ = {k: v for k, v in inspect.get_annotations(method, eval_str=True).items() if k != "self"}
    vars(tool)["__signature__"] = inspect.Signature(parameters)
    return tool


def checked_arguments(call: Call, schemas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of a call, converted if they were written as text, as the tool's schema asks for them.

    Raises CallError, whose sentence is for the model, for a tool that there is not or for other arguments.
    """
    of_tool = {schema["function"]["name"]: schema["function"]["parameters"] for schema in schemas}
    if call.name not in of_tool:
        raise CallError(f"there is no tool {call.name!r}; there are {', '.join(of_tool) or 'none'}")
    schema = of_tool[call.name]
    arguments = dict(call.arguments)
    if call.is_text:
        arguments = {name: _from_text(value, schema["properties"].get(name, {})) for name, value in arguments.items()}
    # transformers' schemas say "nullable" where JSON Schema would name the type "null".
    given: Any = {k: v for k, v in arguments.items() if v is not None or not _is_nullable(schema["properties"].get(k))}
    error = next(Draft202012Validator(schema).iter_errors(given), None)
    if error is not None:
        place = f" in {'.'.join(map(str, error.absolute_path))}" if error.absolute_path else ""
        raise CallError(f"{call.name}: {error.message[:300]}{place}")
    return arguments


def _is_nullable(schema: Mapping[str, Any] | None) -> bool:
    return schema is not None and bool(schema.get("nullable"))


def _from_text(value: str, schema: Mapping[str, Any]) -> object:
    """A value that was written as text, as its type asks for it."""
    if schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # the schema refuses it with a sentence, or takes any text
