"""What a model asks of its attention: transformers passes it as keyword arguments of each call.

Knows no model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.models.source import ModelError

# Keywords of an attention call that change neither which keys a query sees nor how they are weighted.
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})


@dataclass
class Probe:
    """Takes the place of a Packing and records what a model asks of its attention."""

    calls: int = 0
    asked: dict[str, object] = field(default_factory=dict)

    def record(self, keywords: Mapping[str, object]) -> None:
        """Count one attention call, and keep those of its keywords that the learner does not compute."""
        self.calls += 1
        self.asked |= _with_effect(keywords)


def check_keywords(keywords: Mapping[str, object]) -> None:
    """Raises ModelError if a keyword of an attention call changes its result and is not computed."""
    unknown = _with_effect(keywords)
    if unknown:
        raise ModelError(f"the learner's attention does not compute {listed(unknown)}")


def _with_effect(keywords: Mapping[str, object]) -> dict[str, object]:
    """The keywords of an attention call that change its result and are not computed."""

    def has_effect(name: str, value: object) -> bool:
        return not (value is None or name in HARMLESS or (name == "is_causal" and value is True))

    return {name: value for name, value in keywords.items() if has_effect(name, value)}


def listed(keywords: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name}={value}" if isinstance(value, (int, float, str)) else name for name, value in sorted(keywords.items())
    )
