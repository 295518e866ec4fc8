"""What a person sees of a run: a live table on a terminal, plain lines elsewhere, and the table of evaluations.

Knows rows of metrics and records of evaluations; knows nothing of workers.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

from epiphany.report.activity import REFRESH_SECONDS, Spinner, activity, calling_every, print_line
from epiphany.report.columns import columns, fitting, header_lines, one_line, text_of
from epiphany.report.evaluation import unscorable_of
from epiphany.report.metrics import Row

SHOWN_STEPS = 16
SHOWN_WORKERS = 8
MAX_CONSTANT = 40  # characters of the best constant answer


class LiveTable:
    """Shows a row for each step of a run that ends at step `steps`. The live table is shown within a `with` block."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._rows: deque[Row] = deque(maxlen=SHOWN_STEPS)
        self._times: deque[float] = deque(maxlen=20)
        self._warnings: dict[str, str] = {}
        self._spinner: Spinner | None = None
        self._body: tuple[ConsoleDimensions, SegmentLines] | None = None  # rendered for a console of this size
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the table as it is. What comes after it is printed below."""
        self._live.stop()

    def finish(self, evaluations: Sequence[Row]) -> None:
        """Leave the table as it is, and show below what training did."""
        self.close()
        show_evaluations(self._console, evaluations)

    def note(self, text: str) -> None:
        """A line of text, above the table."""
        print_line(self._console, text)

    def step(self, row: Row) -> None:
        """Show a row that Recorder.record returned."""
        for line in row.get("notes", ()):
            self.note(line)
        warnings = warnings_of(row)
        new = [text for name, text in warnings.items() if name not in self._warnings]
        self._warnings = warnings
        self._rows.append(row)
        self._times.append(time.monotonic())
        if self._live.is_started:
            self._body = None
            self._live.refresh()
            return
        for text in new:
            self.note(f"step {row['step']}: {text}")
        self.note(one_line(columns(row, self._steps, self._eta())))

    @contextmanager
    def activity(self, text: str) -> Iterator[None]:
        """Within, show that `text` is being done, below the table or without it."""
        if not self._live.is_started:
            with activity(self._console, text):
                yield
            return
        self._spinner = Spinner(text)
        try:
            with calling_every(REFRESH_SECONDS, self._live.refresh):
                yield
        finally:
            self._spinner = None
            self._live.refresh()

    def _eta(self) -> str:
        if len(self._times) < 2:
            return "-"
        left = self._steps - self._rows[-1]["step"]
        return duration((self._times[-1] - self._times[0]) / (len(self._times) - 1) * left)

    def _render(self) -> RenderableType:
        size = self._console.size
        if self._body is None or self._body[0] != size:
            self._body = size, SegmentLines(self._console.render_lines(self._tables(), pad=False), new_lines=True)
        return self._body[1] if self._spinner is None else Group(self._body[1], self._spinner)

    def _tables(self) -> Group:
        """All but the spinner, with as many steps as the height of the console allows."""
        if not self._rows:
            return Group()
        workers = workers_table(self._rows[-1].get("workers", {}), most=SHOWN_WORKERS)
        below = Group(workers, *(Text(text, style="yellow") for text in self._warnings.values()))
        # Besides: two lines of headers, the spinner, and the line of the cursor.
        free = self._console.height - len(self._console.render_lines(below, pad=False)) - 4
        return Group(self._steps_table(max(1, free)), below)

    def _steps_table(self, most: int) -> Table:
        rows = list(self._rows)[-most:]
        last = len(rows) - 1
        cells = [columns(row, self._steps, self._eta() if i == last else "") for i, row in enumerate(rows)]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        names = fitting(cells, self._console.width)
        for name in names:
            table.add_column(Text("\n".join(header_lines(name))), justify="right", vertical="bottom", no_wrap=True)
        for row in cells:
            table.add_row(*(row.get(name, "") for name in names))
        return table


def duration(seconds: float) -> str:
    """A duration in two units at most, as 3h05m, 12m05s or 45s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 60}m{seconds % 60:02}s" if seconds >= 60 else f"{seconds}s"


def warnings_of(row: Row) -> dict[str, str]:
    """The warnings of a step (report/diagnosis.py) by name, each as a line."""
    return {name: f"{name.replace('_', ' ')}: {text}" for name, text in (row.get("warnings") or {}).items()}


def workers_table(workers: Mapping[str, Row], *, most: int | None = None) -> Table:
    """A line for each of the first `most` workers: the counters that actors/pipeline.py keeps."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("worker", "tok/s", "in flight", "version", "restarts"):
        table.add_column(name, justify="left" if name == "worker" else "right", no_wrap=True)
    for name, worker in list(workers.items())[:most]:
        rate = text_of(worker["tokens_per_second"], ".0f") if worker.get("seconds") else "-"
        cells = [text_of(worker.get(key), "d") for key in ("in_flight", "version", "restarts")]
        table.add_row(name, rate, *cells)
    if most is not None and len(workers) > most:
        table.add_row(f"and {len(workers) - most} more (task=status)", "", "", "", "")
    return table


def show_evaluations(console: Console, records: Sequence[Row]) -> None:
    """The table before/after: the first and the last of the evaluations that have the last one's reward."""
    if not records:
        return
    comparable = [record for record in records if record.get("reward") == records[-1].get("reward")]
    first, last = comparable[0], comparable[-1]
    ends = [("before", first), ("after", last)] if len(comparable) > 1 else [("now", last)]
    checks_answers = last["greedy"]["lenient"] is not None
    measures = ("right\n(95 % interval)", "strict\nform") if checks_answers else ("mean reward\n(95 % interval)",)
    table = Table(title="held-out prompts", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("", "prompts", *measures, "tokens", "truncated"):
        table.add_column(name, justify="right" if name else "left", vertical="bottom", no_wrap=bool(name))
    for kind in ("greedy", "sampled"):
        for label, record in ends:
            if summary := record.get(kind):
                table.add_row(f"{kind} {label}, step {record['step']}", *_cells(summary, checks_answers))
    constant = last["best_constant"]
    if checks_answers and constant["answer"]:
        text = constant["answer"]
        shown = text if len(text) <= MAX_CONSTANT else text[:MAX_CONSTANT] + "..."
        table.add_row(Text(f"best constant answer ({shown!r})"), "", f"{constant['share']:.1%}")
    console.print(table)
    for _, record in ends:
        if unscorable := unscorable_of(record):
            print_line(console, f"step {record['step']}: {unscorable} completions could not be scored and are left out")
    if left_out := [str(record["step"]) for record in records if record not in comparable]:
        print_line(console, f"left out: evaluations under another reward (step {', '.join(left_out)})")


def _cells(summary: Row, checks_answers: bool) -> list[str]:
    prompts = f"{summary['prompts']}" if summary["samples"] == 1 else f"{summary['prompts']} x {summary['samples']}"
    if checks_answers:
        right = _with_interval(summary["lenient"], summary["low"], summary["high"], ".1%")
        measures = [right, text_of(summary["strict"], ".1%")]
    else:
        measures = [_with_interval(summary["reward"], summary.get("reward_low"), summary.get("reward_high"), ".3f")]
    return [prompts, *measures, f"{summary['mean_tokens']:.1f}", f"{summary['truncated']:.0%}"]


def _with_interval(mean: float | None, low: float | None, high: float | None, pattern: str) -> str:
    text = text_of(mean, pattern)
    bounds = f"({text_of(low, pattern)} to {text_of(high, pattern)})".replace("% to", " to")
    return text if low is None else f"{text} {bounds}"
