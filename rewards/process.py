"""Ties the lifetime of a child process to that of its parent. Plain Python."""

import ctypes
import os
import signal
import sys


def bind_to_parent(parent: int) -> None:
    """Make this process die with its parent, the process `parent`, even if that is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
