"""Sinks: where the row of each step goes. JSONL and TensorBoard always; Weights & Biases and trackio on request.

Knows rows; knows neither Arrow nor what the numbers mean. A sink that fails is dropped, and never ends the run.
"""

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from conf.errors import UsageError
from epiphany.report.metrics import Row, read

PROJECT = "epiphany"  # in Weights & Biases and trackio
ALWAYS = ("jsonl", "tensorboard")


class Sink(Protocol):
    """Takes the row of each step, in order. May raise anything: it is dropped then."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SinkOptions:
    """What sinks are opened with. Rows after `last_step` are those of a run that died after its checkpoint."""

    metrics: Path
    tensorboard: Path
    run_name: str
    last_step: int


class JsonlSink:
    """Appends each row to a file as a line of JSON."""

    def __init__(self, options: SinkOptions) -> None:
        self._file = options.metrics
        rows = [row for row in read(self._file) if row["step"] <= options.last_step]
        scratch = self._file.with_suffix(".writing")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scratch.rename(self._file)

    def write(self, row: Row) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def close(self) -> None:
        pass


class TensorBoardSink:
    """Draws each number of the rows as a curve."""

    def __init__(self, options: SinkOptions) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge_step = options.last_step + 1 if options.last_step else None
        self._writer = SummaryWriter(str(options.tensorboard), purge_step=purge_step)

    def write(self, row: Row) -> None:
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Logs to Weights & Biases. A resumed run continues the run there, whose id is kept beside metrics.jsonl."""

    package = "wandb"

    def __init__(self, options: SinkOptions) -> None:
        wandb = importlib.import_module(self.package)
        folder = options.metrics.parent
        id_file = folder / "wandb.id"
        run_id = id_file.read_text().strip() if options.last_step and id_file.is_file() else None
        self._run = wandb.init(project=PROJECT, name=options.run_name, id=run_id, resume="allow", dir=str(folder))
        id_file.write_text(self._run.id)

    def write(self, row: Row) -> None:
        self._run.log(numbers_of(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class TrackioSink:
    """Logs to trackio. A resumed run continues the run of the same name."""

    package = "trackio"

    def __init__(self, options: SinkOptions) -> None:
        self._trackio = importlib.import_module(self.package)
        resume = "allow" if options.last_step else "never"
        self._trackio.init(project=PROJECT, name=options.run_name, resume=resume)

    def write(self, row: Row) -> None:
        self._trackio.log(numbers_of(row), step=row["step"])

    def close(self) -> None:
        self._trackio.finish()


class Sinks:
    """Opens sinks by name and writes each row to all of them. One that raises is closed and dropped.

    Raises UsageError if an opener does.
    """

    def __init__(self, openers: Mapping[str, Callable[[], Sink]]) -> None:
        self._sinks: dict[str, Sink] = {}
        self._notes: list[str] = []
        for name, open_sink in openers.items():
            try:
                self._sinks[name] = open_sink()
            except UsageError:
                self.close()
                raise
            except Exception as error:  # noqa: BLE001 - a sink may raise anything
                self._note(name, error)

    def write(self, row: Row) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(row)
            except Exception as error:  # noqa: BLE001 - a sink may raise anything
                self._note(name, error)
                del self._sinks[name]
                _close(sink)

    def take_notes(self) -> list[str]:
        """The lines about sinks that were dropped since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        for sink in self._sinks.values():
            _close(sink)
        self._sinks.clear()

    def _note(self, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        self._notes.append(f"metrics no longer go to {name}, which failed ({reason}); the run continues without it")


def open_sinks(names: Sequence[str], options: SinkOptions) -> Sinks:
    """JSONL, TensorBoard and the sinks `names`. Raises UsageError as check_sinks does."""
    check_sinks(names)

    def opener(name: str) -> Callable[[], Sink]:
        return lambda: SINKS[name](options)

    return Sinks({name: opener(name) for name in (*ALWAYS, *names)})


def check_sinks(names: Sequence[str]) -> None:
    """Raises UsageError for a sink that is unknown, or whose package is not installed. Imports none of them."""
    for name in names:
        if name not in SINKS:
            extra = ", ".join(known for known in SINKS if known not in ALWAYS)
            raise UsageError(f"run.sinks={name}: choose from {extra}")
        package = getattr(SINKS[name], "package", None)
        if package is not None and not _is_installed(package):
            raise UsageError(
                f"run.sinks={name} needs the package {package}: install it (pip install {package}), or take {name} "
                "out of run.sinks"
            )


def _is_installed(package: str) -> bool:
    """A folder without modules does not count: wandb leaves one of its own name where it runs."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def numbers_of(row: Row, prefix: str = "") -> dict[str, float]:
    """The numbers of a row but its step; those of nested mappings are named a/b."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and prefix + name != "step":
            numbers[prefix + name] = value
    return numbers


def _close(sink: Sink) -> None:
    with contextlib.suppress(Exception):
        sink.close()


SINKS: dict[str, Callable[[SinkOptions], Sink]] = {
    "jsonl": JsonlSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}
