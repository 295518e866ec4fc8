"""Shows that something is being done while nothing else is printed. Knows the console and nothing of runs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

REFRESH_SECONDS = 0.25
LINE_SECONDS = 10.0  # without a terminal
FRAMES = "|/-\\"


class Spinner:
    """A line that moves: what is being done, and for how many seconds."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __rich__(self) -> Text:
        frame = FRAMES[int(self.seconds / REFRESH_SECONDS) % len(FRAMES)]
        return Text(f"{frame} {self._text} ({self.seconds:.0f} s)")


@contextmanager
def activity(console: Console, text: str) -> Iterator[None]:
    """Within, say that `text` is being done: a spinner on a terminal, else a line now and one every LINE_SECONDS."""
    spinner = Spinner(text)
    if console.is_terminal:
        with Live(spinner, console=console, refresh_per_second=1 / REFRESH_SECONDS, transient=True):
            yield
    else:
        print_line(console, f"{text} ...")
        with calling_every(LINE_SECONDS, lambda: print_line(console, f"{text} ... {spinner.seconds:.0f} s")):
            yield


@contextmanager
def calling_every(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Within, another thread calls `call` every `seconds`."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def print_line(console: Console, text: str) -> None:
    """Print text as it is, without markup, colors or line breaks of its own."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
