"""What the benchmarks of peers share: one process for torch.distributed, and the seconds of each step."""

import os
import time
from typing import Any

from transformers import TrainerCallback


def be_one_process() -> None:
    """Set what a launcher would set for one process."""
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    for name, value in values.items():
        os.environ.setdefault(name, value)


class StepTimes(TrainerCallback):
    """Collects step, reward and seconds of each optimizer step, generation and scoring included."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            took = time.monotonic() - self._started
            self.rows.append({"step": state.global_step, "reward": logs["reward"], "seconds": took})
