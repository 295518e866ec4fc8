"""Where the output of rewards goes: a file that cannot fill the disk. Plain Python."""

import contextlib
import io
import os
from pathlib import Path

from rewards.errors import RewardError

MAX_LOG_BYTES = 1 << 20
DROPPED = "\n[over 1 MiB of output from one scoring process: the rest is dropped]\n"


def open_log(file: Path, *, copy_to: int) -> io.TextIOWrapper:
    """A text stream that appends to `file`, and copies to the descriptor `copy_to`, the first MAX_LOG_BYTES.

    Raises RewardError if the file cannot be opened. Later errors, as of a full disk, lose output and nothing else.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise RewardError(f"the log of the rewards, {file}, cannot be written: {error.strerror}") from error
    limited = _LimitedWriter((descriptor, copy_to))
    return io.TextIOWrapper(limited, encoding="utf-8", errors="replace", write_through=True)  # type: ignore[arg-type]


class _LimitedWriter(io.RawIOBase):
    def __init__(self, descriptors: tuple[int, ...]) -> None:
        self._descriptors = descriptors
        self._left = MAX_LOG_BYTES
        self._is_full = False

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        if not self._is_full:
            self._is_full = len(data) > self._left
            shown = bytes(data[: self._left]) + (DROPPED.encode() if self._is_full else b"")
            self._left -= len(shown)
            for descriptor in self._descriptors:
                with contextlib.suppress(OSError):
                    os.write(descriptor, shown)
        return len(data)
