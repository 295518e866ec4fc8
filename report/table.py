"""What a person sees while it runs: a live table on a terminal, plain lines elsewhere, and the table at the end."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

SHOWN_STEPS = 16


class Progress:
    """Shows one row a step. `steps` is where the run ends."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=SHOWN_STEPS)
        self._times: deque[float] = deque(maxlen=20)
        self._warned: set[str] = set()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.__exit__(*exception)

    def note(self, text: str) -> None:
        """A line of text above the table."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, row: Mapping[str, Any]) -> None:
        warnings = warnings_of(row)
        if self._live is None:
            for name in [name for name in warnings if name not in self._warned]:
                self.note(f"step {row['step']}: {warnings[name]}")
        self._warned = set(warnings)
        self._rows.append(row)
        self._times.append(time.monotonic())
        cells = columns(row, self._steps, self._eta(row["step"]))
        if self._live is None:
            self.note(one_line(cells))
            return
        table = Table(box=None, padding=(0, 1))
        for name in cells:
            table.add_column(name, justify="right", no_wrap=True)
        for shown in self._rows:
            table.add_row(*columns(shown, self._steps, self._eta(row["step"]) if shown is row else "").values())
        lines = [Text(line, style="yellow") for line in warnings.values()]
        self._live.update(Group(table, workers_table(row["workers"]), *lines), refresh=True)

    def _eta(self, step: int) -> str:
        if len(self._times) < 2:
            return "?"
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1) * (self._steps - step)
        return f"{seconds / 60:.0f}m{seconds % 60:02.0f}s" if seconds >= 60 else f"{seconds:.0f}s"


def columns(row: Mapping[str, Any], steps: int, eta: str) -> dict[str, str]:
    """The columns of one step, as text."""
    terms = (
        {name: f"{value:.2f}" for name, value in row["reward_terms"].items()} if len(row["reward_terms"]) > 1 else {}
    )
    kl = row["reference_kl"]
    return {
        "step": f"{row['step']}/{steps}",
        "reward": f"{row['reward']:.3f}",
        **terms,
        "no signal": f"{row['no_signal_share']:.0%}",
        "tokens": f"{row['completion_tokens']:.1f}",
        "cut": f"{row['truncated_share']:.0%}",
        "entropy": f"{row['entropy']:.2f}",
        "kl": "-" if kl is None else f"{kl:.3f}",
        "mismatch": f"{row['mismatch']:.1e}",
        "lag": f"{row['lag']:.1f}",
        "rollout tok/s": f"{row['rollout_tokens_per_second']:.0f}",
        "learner tok/s": f"{row['learner_tokens_per_second']:.0f}",
        "s": f"{row['seconds']:.2f}",
        "left": eta,
    }


def warnings_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What report.diagnosis says of a step, by name, each as a line."""
    return {name: f"{name.replace('_', ' ')}: {text}" for name, text in row.get("warnings", {}).items()}


def one_line(cells: Mapping[str, str]) -> str:
    """Columns beside each other, without the empty ones."""
    return "  ".join(f"{name} {value}" for name, value in cells.items() if value)


def workers_table(workers: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row of each worker (actors/pipeline.py, Pipeline.report)."""
    table = Table(box=None, padding=(0, 1))
    for name in ("worker", "tok/s", "groups it has", "version", "replaced"):
        table.add_column(name, justify="left" if name == "worker" else "right", no_wrap=True)
    for name, w in workers.items():
        rate = f"{w['tokens_per_second']:.0f}" if "tokens_per_second" in w else ""
        table.add_row(name, rate, f"{w['open']}", f"{w.get('version', '')}", f"{w['losses']}")
    return table


def show_evaluations(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """The table before/after: the first evaluation and the last."""
    table = Table(title="held-out prompts")
    for name in ("", "prompts", "right (95 % interval)", "right, strict form", "tokens", "cut"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    ends = [("before", records[0]), ("after", records[-1])] if len(records) > 1 else [("before", records[0])]
    for kind in ("greedy", "sampled"):
        for label, one in ends:
            a = one[kind]
            if a:
                share = f"{a['lenient']:.1%} ({a['low']:.1%} to {a['high']:.1%})"
                prompts = f"{a['prompts']}" if a["samples"] == 1 else f"{a['prompts']} x {a['samples']}"
                row = (f"{kind}, {label} (step {one['step']})", prompts, share, f"{a['strict']:.1%}")
                table.add_row(*row, f"{a['mean_tokens']:.1f}", f"{a['truncated']:.0%}")
    constant = records[-1]["best_constant"]
    table.add_row(f"best constant answer ({constant['answer']!r})", "", f"{constant['share']:.1%}", "", "", "")
    console.print(table)
