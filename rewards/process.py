"""Ties the lifetime of a child process to that of its parent. Plain Python."""

import ctypes
import os
import signal
import sys


def bind_to_parent(parent: int, *, by: signal.Signals = signal.SIGKILL) -> None:
    """Let this process get a signal when its parent, process `parent`, ends, even if that is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, by)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
