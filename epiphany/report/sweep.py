"""The runs of a sweep beside each other, from their folders. Loads no torch."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from epiphany.report import metrics
from epiphany.report.evaluation import headline
from epiphany.report.metrics import Row
from epiphany.report.run_folder import Layout


def show_sweep(console: Console, folders: Sequence[Path]) -> None:
    """A line for each run of `folders`, the best first: its steps, and its last evaluation on the held-out prompts.

    Best is the share of right greedy answers, or the mean reward if the reward checks no answers. A run without an
    evaluation comes last.
    """
    runs = [(Layout(folder), metrics.read(Layout(folder).evaluations)) for folder in folders]
    runs.sort(key=lambda run: _score(run[1]), reverse=True)
    table = Table(title="the runs of the sweep", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("steps", "greedy", "sampled"):
        table.add_column(name, justify="right", no_wrap=True)
    for paths, evaluations in runs:
        last: Row = evaluations[-1] if evaluations else {"step": "-"}
        cells = [headline(last[kind]) if last.get(kind) else "-" for kind in ("greedy", "sampled")]
        table.add_row(paths.path.name, str(last["step"]), *cells)
    console.print(table)


def _score(evaluations: Sequence[Row]) -> float:
    greedy = evaluations[-1]["greedy"] if evaluations else {}
    score = greedy.get("reward") if greedy.get("lenient") is None else greedy["lenient"]
    return float("-inf") if score is None else score
