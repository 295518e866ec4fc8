"""Tools from classes: what a model is told of them, and which arguments they take."""

from typing import Any, Literal

import pytest

from actors.environments.calls import Call, CallError
from actors.environments.errors import EnvironmentRefused
from actors.environments.tools import checked_arguments, tool_schemas


class Counter:
    """An environment in TRL's way."""

    def reset(self, **row: Any) -> str | None:
        self.count = 0

    def increment(self, step: int, unit: Literal["one", "ten"] = "one") -> int:
        """Increase the counter.

        Args:
            step: By how much.
            unit: What a step is.

        Returns:
            The counter.
        """
        self.count += step * (10 if unit == "ten" else 1)
        return self.count

    def note(self, text: str, tags: list[str] | None = None) -> None:
        """Keep a note.

        Args:
            text: The note.
            tags: What it is about.
        """

    def get_reward(self) -> float:
        return float(self.count)

    def _helper(self) -> None: ...


class Better(Counter):
    def read(self) -> int:
        """Read the counter."""
        return self.count


def test_public_methods_are_tools_with_their_types_and_descriptions():
    schemas = tool_schemas(Better)
    assert [schema["function"]["name"] for schema in schemas] == ["increment", "note", "read"]
    increment = schemas[0]["function"]
    assert increment["description"] == "Increase the counter."
    assert increment["parameters"] == {
        "type": "object",
        "properties": {
            "step": {"type": "integer", "description": "By how much."},
            "unit": {"type": "string", "enum": ["one", "ten"], "description": "What a step is."},
        },
        "required": ["step"],
        "additionalProperties": False,
    }
    assert schemas[2]["function"]["parameters"]["properties"] == {}


class Untyped:
    def tool(self, x) -> None:
        """Do.

        Args:
            x: Something.
        """


class Undocumented:
    def tool(self, x: int) -> None: ...


class Half:
    def tool(self, x: int, y: int) -> None:
        """Do.

        Args:
            x: Something.
        """


class Anything:
    def tool(self, *rest: int) -> None:
        """Do."""


@pytest.mark.parametrize("environment", [Untyped, Undocumented, Half])
def test_a_tool_that_says_too_little_is_refused(environment: type):
    with pytest.raises(EnvironmentRefused, match=rf"{environment.__name__}\.tool cannot be described to a model"):
        tool_schemas(environment)


def test_a_tool_that_takes_anything_is_refused():
    with pytest.raises(EnvironmentRefused, match=r"Anything\.tool takes \*rest: int: name each argument"):
        tool_schemas(Anything)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (Call("increment", {"step": 2}), {"step": 2}),
        (Call("increment", {"step": "2", "unit": "ten"}, is_text=True), {"step": 2, "unit": "ten"}),
        (Call("note", {"text": "12", "tags": '["a"]'}, is_text=True), {"text": "12", "tags": ["a"]}),
        (Call("note", {"text": "x", "tags": None}), {"text": "x", "tags": None}),
    ],
)
def test_arguments_of_the_right_types_are_taken(call: Call, arguments: dict[str, object]):
    assert checked_arguments(call, tool_schemas(Counter)) == arguments


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call("decrement", {}), "there is no tool 'decrement'; there are increment, note"),
        (Call("get_reward", {}), "there is no tool 'get_reward'"),
        (Call("_helper", {}), "there is no tool '_helper'"),
        (Call("increment", {}), "increment: 'step' is a required property"),
        (Call("increment", {"step": "two"}), "increment: 'two' is not of type 'integer' in step"),
        (Call("increment", {"step": "two"}, is_text=True), "'two' is not of type 'integer' in step"),
        (Call("increment", {"step": 1, "unit": "hundred"}), "'hundred' is not one of"),
        (Call("increment", {"step": 1, "self": 1}), "'self' was unexpected"),
    ],
)
def test_other_calls_are_told_to_the_model(call: Call, message: str):
    with pytest.raises(CallError, match=message):
        checked_arguments(call, tool_schemas(Counter))
