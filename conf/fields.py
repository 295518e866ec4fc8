"""How a setting is declared: its default, its explanation and the values it may take stand together at its field.

validate.py checks the rules, reference.py prints the explanations. Knows no setting.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value")
# Values that a function of somebody else understands; any keys. (OmegaConf has no other type for this.)
Options = dict[str, Any]
# The key of the rule in a field's metadata.
RULE = "rule"


@dataclass(frozen=True)
class Rule:
    """What a setting means and which values make sense.

    The choices of a list limit its elements; null is allowed wherever the type allows it. An `extensible` setting also
    takes an object of the user's own, as module:name or file.py:name. `above` and `below` exclude the limit itself.
    """

    help: str
    choices: tuple[str, ...] = ()
    extensible: bool = False
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None


def setting(
    default: Value,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    extensible: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Value:
    """A dataclass field with an immutable default and a Rule. Its static type is that of `default`."""
    rule = Rule(help, choices, extensible, minimum, maximum, above, below)
    return cast(Value, field(default=default, metadata={RULE: rule}))


def explained(help: str, *, choices: tuple[str, ...] = ()) -> dict[str, Rule]:
    """The metadata of a field with a default factory."""
    return {RULE: Rule(help, choices)}


@dataclass(frozen=True)
class Setting:
    """One setting as it stands: its dotted key, its value and how it was declared."""

    key: str
    value: object
    rule: Rule
    nullable: bool
    type_name: str


def walk(section: object, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a section and of the sections in it, in the order of declaration. The entries of a list of
    sections follow the list, as `reward.terms[0].fn`."""
    for declared in fields(cast("DataclassInstance", section)):
        value = getattr(section, declared.name)
        key = f"{prefix}{declared.name}"
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
            continue
        yield _described(declared, key, value)
        if isinstance(value, list):
            for index, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from walk(entry, f"{key}[{index}].")


def _described(declared: Field[object], key: str, value: object) -> Setting:
    rule = cast(Rule, declared.metadata[RULE])
    options = get_args(declared.type) or (declared.type,)
    name = declared.type.__name__ if isinstance(declared.type, type) else str(declared.type)
    return Setting(key, value, rule, NoneType in options, name)
