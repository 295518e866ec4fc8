"""LearnerWorker: a learner with its checkpoints, alone or one of several ranks. Knows files; knows neither the road nor
engines."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from actors.types import Adapter
from learner import checkpoint, ranks
from learner.learner import Learner
from learner.stats import StepStats


class LearnerWorker:
    """`checkpoints` is where this run's lie; the newest `keep` stay. `notes` are for the user."""

    def __init__(
        self, learner: Learner, *, rank: ranks.Ranks, checkpoints: Path, base_model: str, keep: int, on_host: bool,
        notes: list[str],
    ) -> None:  # fmt: skip
        self.learner = learner
        self._rank = rank
        self._store: Any = None
        self._table: pa.Table | None = None
        self._checkpoints = checkpoints
        self._base_model = base_model
        self._keep = keep
        self._on_host = on_host
        self._buffer: torch.Tensor | None = None
        self._notes = notes

    def notes(self) -> list[str]:
        return self._notes

    def resume(self, wanted: str) -> tuple[str, dict[str, Any]] | None:
        """Go on from a checkpoint (`wanted` as run.resume says): its folder and state, or None if there is none."""
        found = checkpoint.find(self._checkpoints, wanted)
        if found is None:
            return None
        checkpoint.load(found, self.learner)
        return str(found.folder), found.state

    def open_store(self, host: str) -> int:
        """Listen for the other ranks on `host`; returns the port."""
        self._store, port = ranks.open_store(host)
        return port

    def join(self, store_host: str, port: int, host: str, seconds: float) -> None:
        """Meet the other ranks at the first one's store. `host` is this machine's address."""
        store = self._store or ranks.find_store(store_host, port, seconds=seconds)
        ranks.join(store, self._rank, host=host, device=self.learner.policy.device, seconds=seconds)
        self.learner.ranks = self._rank

    def hold(self, table: pa.Table) -> None:
        """Keep the rows of the next step."""
        self._table = table

    def step(self) -> StepStats:
        """Learn from the rows that are held."""
        assert self._table is not None
        table, self._table = self._table, None
        return self.learner.step(table)

    def adapter(self) -> Adapter:
        """The weights as they are now; where they will travel, in a buffer of the host's that the next call fills again."""
        if self._on_host and self._buffer is None:
            flat = self.learner.policy.lora.flat
            self._buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        return self.learner.adapter(self._buffer)

    def save(self, state: dict[str, Any]) -> str:
        """Write a checkpoint with `state` and return its folder."""
        folder = checkpoint.save(self._checkpoints, self.learner, state, base_model=self._base_model, keep=self._keep)
        return str(folder)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT layout."""
        checkpoint.save_adapter(folder, self.learner.adapter(), base_model=self._base_model)

    def close(self) -> None:
        """Leave the other ranks, if there are any: an engine in the same process has a process group of its own."""
        if self.learner.ranks.count > 1:
            ranks.leave()
