"""What is checked before torch is imported, so that a mistake is told at once: the rows, the sinks, the run folder and
the reward.

Knows data, rewards and the run folder; knows no model.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Settings
from epiphany.report.run_folder import RunFolder
from epiphany.report.sinks import check_sinks
from epiphany.reward_check import check_reward
from epiphany.rows import Rows, read_rows


@dataclass(frozen=True)
class Checked:
    """A run whose rows, folder and reward are in order. The folder is locked. `max_scores` are the largest rewards by
    source, where they are known.
    """

    rows: Rows
    folder: RunFolder
    max_scores: Mapping[str, float | None]


def check(settings: Settings, note: Callable[[str], None], closing: ExitStack) -> Checked:
    """Check what needs no model. Raises UsageError for what is wrong. `closing` gives the run folder back."""
    rows = check_inputs(settings)
    folder = RunFolder(Path(settings.run.folder))
    closing.callback(folder.close)
    return Checked(rows, folder, check_reward(settings, rows, note, log=folder.reward_log))


def check_inputs(settings: Settings) -> Rows:
    """The rows of a run whose sinks can be opened. Raises UsageError, and writes nothing."""
    rows = read_rows(settings)
    check_sinks(settings.run.sinks)
    return rows
