"""The memory of a GPU as its driver counts it, which is more than torch knows of."""

import os
import subprocess
import threading
import time
from pathlib import Path

import torch

GIB = 2**30


class MemorySampler(threading.Thread):
    """Samples the memory in use on the card (GiB) every 20 ms.

    `samples` holds it beside the size of `metrics` (a run's metrics.jsonl) by then, or 0 without such a file.
    `first_row_after` is the time in seconds until that file had its first line.
    """

    def __init__(self, metrics: Path | None = None) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, float]] = []
        self._metrics = metrics
        self._ended = threading.Event()
        self._began = time.monotonic()
        self.first_row_after: float | None = None
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            is_written = self._metrics is not None and self._metrics.exists()
            size = self._metrics.stat().st_size if self._metrics is not None and is_written else 0
            if size and self.first_row_after is None:
                self.first_row_after = time.monotonic() - self._began
            self.samples.append((size, gib_in_use()))

    def finish(self) -> list[tuple[int, float]]:
        """End the thread and return its samples."""
        self._ended.set()
        self.join()
        return self.samples


def gib_in_use() -> float:
    """GiB in use on the card, of every process. Opens a CUDA context in this one."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def gib_in_use_by_others() -> float:
    """GiB in use on the card before this process touches it: opens no CUDA context."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={card}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
