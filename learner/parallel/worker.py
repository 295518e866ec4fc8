"""LearnerWorker: a learner with its checkpoints, alone or one of several ranks.

Knows files; knows neither the pipeline nor engines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from actors.models.peft_folder import write_peft_folder
from actors.types import Adapter
from conf.errors import disk_errors
from learner import checkpoint
from learner.learner import Learner
from learner.metrics import StepStats
from learner.parallel import data_parallel
from learner.parallel.data_parallel import DataParallel


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that the learner continues from, the state that was stored with it, and lines for the user."""

    folder: str
    version: int
    state: Mapping[str, object]
    notes: list[str]


class LearnerWorker:
    """A learner whose checkpoints lie in `checkpoints`, of which the newest `keep` stay. `notes` are for the user.

    `make_supervised` makes the learner that warms up the same policy. `adapter_leaves_process`: adapters go to other
    processes, so that they are copied into one buffer of the host.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        make_supervised: Callable[[], Learner],
        ranks: DataParallel,
        checkpoints: Path,
        base_model: str,
        keep: int,
        adapter_leaves_process: bool,
        notes: list[str],
    ) -> None:
        self.learner = learner
        self._make_supervised = make_supervised
        self._supervised: Learner | None = None
        self._ranks = ranks
        self._store: dist.TCPStore | None = None
        self._table: pa.Table | None = None
        self._checkpoints = checkpoints
        self._base_model = base_model
        self._keep = keep
        self._adapter_leaves_process = adapter_leaves_process
        self._buffer: torch.Tensor | None = None
        self._notes = notes

    def notes(self) -> list[str]:
        return self._notes

    def optimizer_kind(self) -> str:
        return self.learner.optimizer.kind

    def resume(self, resume: str) -> Resumed | None:
        """Continue from the checkpoint that run.resume names, or None if there is none."""
        saved = checkpoint.find(self._checkpoints, resume)
        if saved is None:
            return None
        adapter, tensors = checkpoint.load(saved, self.learner.policy.lora.layout)
        self.learner.load(adapter)
        self.learner.load_state_dict(tensors)
        algorithm = self.learner.algorithm
        algorithm.kl_coefficient = saved.state.get("kl_coefficient", algorithm.kl_coefficient)
        dtype = self._dtype
        former = saved.state.get("dtype", dtype)
        changed = f"changed since this checkpoint: model.dtype is {dtype}, it was {former}"
        notes = [] if former == dtype else [changed]
        return Resumed(str(saved.folder), adapter.version, saved.state, notes)

    @property
    def _dtype(self) -> str:
        return str(self.learner.policy.dtype).removeprefix("torch.")

    def open_store(self, host: str) -> int:
        """Listen for the other ranks on `host`; returns the port."""
        self._store, port = data_parallel.open_store(host)
        return port

    def join(self, store_host: str, port: int, host: str, seconds: float) -> None:
        """Meet the other ranks at the first one's store. `host` is this machine's address."""
        store = self._store or data_parallel.connect_store(store_host, port, seconds=seconds)
        data_parallel.join(store, self._ranks, host=host, device=self.learner.policy.device, seconds=seconds)
        self.learner.data_parallel = self._ranks
        if self.learner.sharded is not None:
            self.learner.sharded.connect(self._ranks, seconds=seconds)

    def receive(self, table: pa.Table) -> None:
        """Take the rows of the next step. All ranks have them before any of them begins."""
        self._table = table

    def step(self) -> StepStats:
        """Learn from the rows that were received."""
        assert self._table is not None
        table, self._table = self._table, None
        return self.learner.step(table)

    def policy_logprobs(self) -> np.ndarray:
        """What the policy gave to each sampled token of the last step's rows before it (float32, in their order;
        NaN for tokens that were not trained).
        """
        logprobs_A = self.learner.policy_logprobs_A.cpu().numpy()
        return np.where(np.isneginf(logprobs_A), np.nan, logprobs_A)

    def warm_up(self, table: pa.Table) -> StepStats:
        """A step of supervised fine-tuning on the rows of `table`. It does not count as a version."""
        if self._supervised is None:
            self._supervised = self._make_supervised()
            self._supervised.data_parallel = self.learner.data_parallel
        with self.learner.policy.plain_distribution():
            return self._supervised.step(table)

    def end_warm_up(self) -> None:
        """Free what the warm-up needed."""
        self._supervised = None

    def adapter(self) -> Adapter:
        """The weights as they are now: in a buffer that the next call fills again if they leave the process, else the
        learner's own, which the next step changes.
        """
        lora = self.learner.policy.lora
        if not self._adapter_leaves_process:
            return Adapter(self.learner.version, lora.layout, lora.flat.detach())
        if self._buffer is None:
            flat = lora.flat
            self._buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        return self.learner.adapter(self._buffer)

    def save(self, state: Mapping[str, object]) -> str:
        """Write a checkpoint with `state` and return its folder."""
        folder = checkpoint.save(
            self._checkpoints,
            adapter=self.learner.adapter(),
            tensors=self.learner.state_dict(),
            state={
                **state,
                "kl_coefficient": self.learner.algorithm.kl_coefficient,
                "dtype": self._dtype,
            },
            base_model=self._base_model,
            keep=self._keep,
        )
        return str(folder)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT layout."""
        with disk_errors(folder):
            write_peft_folder(folder, self.learner.adapter(), base_model=self._base_model)

    def close(self) -> None:
        """Leave the other ranks, if there are any: an engine in the same process has a process group of its own."""
        if self.learner.data_parallel.world_size > 1:
            data_parallel.leave()
