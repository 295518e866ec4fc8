"""What the page holds, as plain data, from the folders of runs. Knows files; knows no HTML."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import TermSettings
from epiphany.report import metrics
from epiphany.report.gaming import answer_terms, gamed_reward
from epiphany.report.page.answers import side_by_side
from epiphany.report.page.curves import SECTIONS, curves, seconds_by_part, warnings
from epiphany.report.page.rollouts import rollouts
from epiphany.report.run_folder import Layout, RunFolderError, read_settings
from epiphany.report.started import read_started

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def content_of(folder: Layout, others: Sequence[Layout], *, tokenizer: "PreTrainedTokenizerBase | None") -> metrics.Row:
    """The run in `folder` in full, and the curves of `others`, which are laid over its own.

    Raises RunFolderError for a folder that holds no run.
    """
    names = _names([folder, *others])
    runs = [_run(of_run, name) for of_run, name in zip([folder, *others], names, strict=True)]
    return {
        "sections": SECTIONS,
        "runs": runs,
        "answers": side_by_side(folder, runs[0]["evaluations"]),
        "rollouts": rollouts(folder, tokenizer),
        "has_tokens": tokenizer is not None,
    }


def _names(folders: Sequence[Layout]) -> list[str]:
    """The folders' own names, with as much of their paths as sets them apart."""
    paths = [folder.path.resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths)]


def _run(folder: Layout, name: str) -> metrics.Row:
    if not folder.settings.is_file():
        raise RunFolderError(f"{folder.path} holds no run")
    rows, evaluations = metrics.read(folder.metrics), metrics.read(folder.evaluations)
    stored, started = read_settings(folder), read_started(folder)
    return {
        "name": name,
        "curves": curves(rows),
        "evaluations": evaluations,
        "warnings": [*warnings(rows), *_of_evaluations(rows, evaluations, stored.settings)],
        "seconds": seconds_by_part(rows, evaluations),
        "settings": flat(stored.settings),
        **started,
    }


def _of_evaluations(
    rows: Sequence[metrics.Row], evaluations: Sequence[metrics.Row], settings: metrics.Row
) -> list[metrics.Row]:
    """The warning of a reward that is gamed, as those of steps."""
    terms = [TermSettings(fn=term["fn"], name=term["name"]) for term in settings["reward"]["terms"]]
    text = gamed_reward(rows, evaluations, checking=answer_terms(terms))
    if text is None:
        return []
    last = evaluations[-1]["step"]
    return [{"name": "gamed reward", "text": text, "first": last, "last": last, "steps": 1, "is_current": True}]


def flat(tree: object, key: str = "") -> dict[str, object]:
    """The leaves of a tree of settings, by dotted name. Lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    return {name: leaf for k, of_key in tree.items() for name, leaf in flat(of_key, f"{key}.{k}".lstrip(".")).items()}
