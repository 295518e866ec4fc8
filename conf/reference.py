"""The reference of all settings, from their declarations: `python -m conf.reference > docs/config.md`."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from conf.facts import ALGORITHMS, TASKS, readers
from conf.fields import Setting, walk
from conf.schema import GROUPS, Settings, TermSettings

INTRODUCTION = """\
# Settings

<!-- Generated from conf/schema*.py by `python -m conf.reference > docs/config.md`. -->

`python launch.py [group=preset ...] [section.key=value ...]` sets any of them. Without arguments,
`experiment=quickstart` trains SmolLM2-135M on one-digit sums. If you choose data, a model or a reward, the defaults
below apply instead; add `experiment=<name>` to get the settings of an experiment. `data.source=<source>` alone implies
`data=file`.

- `python launch.py <overrides> --cfg job` prints the settings that a run would have.
- `run=<folder>` is short for `run.folder=<folder>`. The same command again resumes the run.
- `null` leaves a choice to Epiphany; the explanation says what it does.
- A setting that the chosen algorithm does not read is refused if it is changed.
"""

TYPES = {
    "str": "text",
    "bool": "`true`, `false`",
    "float": "a number",
    "list[str]": "a list of texts",
    "list[float]": "two numbers",
    "list[conf.schema_inputs.TermSettings]": "a list of terms",
    "list[conf.schema_inputs.SourceSettings]": "a list of sources",
    "dict[str, typing.Any]": "`{name: value, ...}`",
}


def reference() -> str:
    """The text of docs/config.md."""
    return "\n".join([INTRODUCTION, *_tasks(), *_presets(), *_sections(Settings(), ""), *_terms()])


def _tasks() -> Iterator[str]:
    yield "## task\n\n| task | does |\n|---|---|"
    yield from (_row(f"`{name}`", text) for name, text in TASKS.items())
    yield ""


def _presets() -> Iterator[str]:
    yield "## Presets\n\n| preset | sets |\n|---|---|"
    for group in GROUPS:
        for file in sorted((Path(__file__).parent / group).glob("*.yaml")):
            comment = next(line for line in file.read_text().splitlines() if line.startswith("# ") and "@" not in line)
            yield _row(f"`{group}={file.stem}`", comment.removeprefix("# "))
    yield ""


def _sections(section: object, prefix: str) -> Iterator[str]:
    """A table for each section, parents before children."""
    for declared in fields(type(section)):  # type: ignore[arg-type]
        child = getattr(section, declared.name)
        if not is_dataclass(child):
            continue
        key = f"{prefix}{declared.name}"
        yield f"## {key}\n\n{_paragraph(child)}\n\n{_table(child, f'{key}.')}\n"
        yield from _sections(child, f"{key}.")


def _terms() -> Iterator[str]:
    yield f"## reward.terms[i]\n\n{_paragraph(TermSettings())}\n\n{_table(TermSettings(), '')}\n"


def _paragraph(section: object) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(section: object, prefix: str) -> str:
    """The settings of one section, without those of the sections in it."""
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for setting in walk(section, prefix):
        if "." not in setting.key.removeprefix(prefix):
            cells = (f"`{setting.key}`", _default(setting), _allowed(setting), _meaning(setting))
            lines.append(_row(*cells))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") if "`" not in cell else cell for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _meaning(setting: Setting) -> str:
    """The explanation, and which algorithms read the setting unless all do."""
    section, _, name = setting.key.partition(".")
    if section != "algorithm" or "." in name or len(reading := readers(name)) == len(ALGORITHMS):
        return setting.rule.help
    others = [algorithm for algorithm in ALGORITHMS if algorithm not in reading]
    verb, names = ("Read by", reading) if len(reading) <= len(others) else ("Not read by", others)
    return f"{setting.rule.help} {verb} {', '.join(names)}."


def _default(setting: Setting) -> str:
    match setting.value:
        case None:
            text = "null"
        case bool():
            text = str(setting.value).lower()
        case "???":
            return "required"
        case "":
            text = '""'
        case list():
            text = f"[{', '.join(map(str, setting.value))}]"
        case float():
            text = f"{setting.value:g}"
        case _:
            text = str(setting.value)
    return f"`{text}`"


def _allowed(setting: Setting) -> str:
    rule = setting.rule
    if rule.choices:
        choices = (*["null"] * setting.nullable, *rule.choices, *["module:name"] * rule.extensible)
        return ", ".join(f"`{choice}`" for choice in choices)
    limits = (
        ("at least", rule.minimum),
        ("over", rule.above),
        ("at most", rule.maximum),
        ("under", rule.below),
    )
    words = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
    return " and ".join(words) or TYPES[setting.type_name.removesuffix(" | None")]


if __name__ == "__main__":
    print(reference(), end="")
