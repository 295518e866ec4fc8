"""A child process of our own that can be killed, and that is spoken to in lines of JSON.

JSON, not pickle: what a child sends back is never executed. It leads a process group of its own, which is killed as a
whole. Knows processes; knows nothing of what they do.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

MAX_ANSWER_BYTES = 1 << 20
SEND_SECONDS = 10.0
MAX_STDERR = 1500  # characters of a traceback that are shown


class ChildLost(Exception):
    """The child did not answer; the message is the reason."""


class ChildProcess:
    """`python -m module`, which reads lines of JSON from its standard input and writes them to its standard output."""

    def __init__(self, module: str) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(_import_path()), "OMP_NUM_THREADS": "1"}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        # -P: without it, a rewards/ or conf/ in the user's folder would come before ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        self._buffer = b""

    def send(self, message: Mapping[str, object]) -> None:
        """Send one line. Raises ChildLost if the child has ended, or does not read it within SEND_SECONDS."""
        assert self._process.stdin is not None
        deadline, view = time.monotonic() + SEND_SECONDS, memoryview(json.dumps(message).encode() + b"\n")
        try:
            while view:
                if not select.select([], [self._process.stdin], [], max(0.0, deadline - time.monotonic()))[1]:
                    raise ChildLost(f"it read nothing for {SEND_SECONDS:g} s")
                view = view[os.write(self._process.stdin.fileno(), view[: select.PIPE_BUF]) :]
        except BrokenPipeError as error:
            raise ChildLost(self._reason()) from error

    def receive(self, seconds: float) -> object:
        """The next line, parsed. Raises ChildLost if there is none within `seconds`, or it is no JSON."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self], [], [], left)[0]:
                raise ChildLost(f"no answer within {seconds:g} s")
            self._read()
        return self._pop()

    def receive_ready(self) -> list[object]:
        """The lines that are there once `select` says so, parsed. Raises ChildLost as `receive` does."""
        self._read()
        lines = []
        while b"\n" in self._buffer:
            lines.append(self._pop())
        return lines

    def fileno(self) -> int:
        """What `select` waits for."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _read(self) -> None:
        data = os.read(self.fileno(), 1 << 16)
        self._buffer += data
        if not data:
            raise ChildLost(self._reason())
        if len(self._buffer) > MAX_ANSWER_BYTES:
            raise ChildLost("an answer of over 1 MiB")

    def _pop(self) -> object:
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            return json.loads(line)
        except ValueError as error:
            raise ChildLost("an answer that is not JSON") from error

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()

    def stderr(self) -> str:
        """The end of what it wrote to stderr before it was ready."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").strip()[-MAX_STDERR:]

    def _reason(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code}"


def _import_path() -> list[str]:
    """Where the child looks for modules: as this process does, with our own folder first and the user's last."""
    ours, users = str(Path(__file__).resolve().parents[2]), str(Path.cwd())
    return [ours, *(p for p in sys.path if p and str(Path(p).resolve()) not in (ours, users)), users]
