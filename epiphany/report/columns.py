"""The columns of a step: what each shows, and which fit the console. Plain Python over rows of metrics."""

from collections.abc import Mapping, Sequence
from typing import cast

from epiphany.report.metrics import Row

NOT_MEASURED = "-"
GAP = 2  # spaces between two columns
# Shown as far as the width allows, in this order; reward terms come last.
PRIORITY = (
    "step",
    "reward",
    "unscored",
    "no signal",
    "tokens",
    "truncated",
    "entropy",
    "logprob gap",
    "step s",
    "eta",
    "kl",
    "staleness",
    "rollout tok/s",
    "learner tok/s",
)
# Columns that are shown also where they have no value.
ALWAYS = ("step", "reward", "no signal", "tokens", "truncated", "entropy", "logprob gap", "step s", "eta")
# Other headers of two words take two lines.
ONE_LINE = ("step s",)


def columns(row: Row, steps: int, eta: str) -> dict[str, str]:
    """The columns of one step of `steps`, by header, as text in the order in which they are shown."""
    terms = row.get("reward_terms") or {}

    def shown(name: str, pattern: str) -> str:
        return text_of(row.get(name), pattern)

    return {
        "step": f"{row['step']}/{steps}",
        "reward": shown("reward", ".3f"),
        **({name: text_of(value, ".2f") for name, value in terms.items()} if len(terms) > 1 else {}),
        **{f"of {name}": text_of(of["reward"], ".2f") for name, of in (row.get("by_source") or {}).items()},
        "no signal": shown("zero_variance_share", ".0%"),
        "tokens": shown("completion_tokens", ".1f"),
        "truncated": shown("truncated_share", ".0%"),
        "unscored": str(row.get("unscorable") or ""),
        "entropy": shown("entropy", ".2f"),
        "kl": shown("reference_kl", ".3f"),
        "logprob gap": shown("logprob_gap", ".1e"),
        "staleness": shown("staleness", ".1f"),
        "rollout tok/s": shown("rollout_tokens_per_second", ".0f"),
        "learner tok/s": shown("learner_tokens_per_second", ".0f"),
        "step s": shown("seconds", ".2f"),
        "eta": eta,
    }


def text_of(value: object, pattern: str) -> str:
    """A number in the format `pattern`; NOT_MEASURED for None."""
    return NOT_MEASURED if value is None else format(cast(float, value), pattern)


def one_line(cells: Mapping[str, str]) -> str:
    """All columns beside each other, without the empty ones."""
    return "  ".join(f"{name} {value}" for name, value in cells.items() if value)


def header_lines(name: str) -> list[str]:
    """The header of a column, of two words on two lines."""
    return [name] if name in ONE_LINE else name.split(" ", 1)


def fitting(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """The headers of the columns of `rows` that fit into `width` characters, in the order in which they are shown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    by_priority = [*PRIORITY, *(name for name in names if name not in PRIORITY)]
    chosen: set[str] = set()
    left = width + GAP
    for name in by_priority:
        cells = [row.get(name, "") for row in rows]
        if name not in names or (name not in ALWAYS and not set(cells) - {"", NOT_MEASURED}):
            continue
        left -= GAP + max(map(len, [*header_lines(name), *cells]))
        if left < 0:
            break
        chosen.add(name)
    return [name for name in names if name in chosen]
