"""What a child process owes its parent."""

import ctypes
import os
import signal
import sys


def bind_to_parent(parent: int) -> None:
    """Die when the process `parent`, which started this one, dies, also by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
