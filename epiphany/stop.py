"""Stop: what SIGINT and SIGTERM do to a run. Knows signals; knows no run."""

import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal that came before the run had anything to save."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stop:
    """The first SIGINT or SIGTERM asks the loop to stop after what it is doing; the second ends the process.

    Before `arm`, while nothing is trained yet, the first one raises Interrupted.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._is_armed = False
        self._former = {number: signal.getsignal(number) for number in SIGNALS}
        self._listen()

    def arm(self) -> None:
        """From now on there is something to save. Libraries may have set handlers of their own meanwhile."""
        self._is_armed = True
        self._listen()

    def close(self) -> None:
        """Give the signals back to whom they belonged before the run."""
        for number, handler in self._former.items():
            # One that Python did not install is None, and cannot be given back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __bool__(self) -> bool:
        return self.requested is not None

    @property
    def exit_code(self) -> int:
        """0, or 128 and the number of the signal."""
        return 0 if self.requested is None else 128 + self.requested

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number
        name = signal.Signals(number).name
        if not self._is_armed:
            print(f"\n{name}: stopped before the first step", file=sys.stderr)
            raise Interrupted(number)
        print(f"\n{name}: saving; a second signal ends the run at once", file=sys.stderr)
