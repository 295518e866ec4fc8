"""One vLLM engine over several devices: what its processes do, and how an adapter gets into all of them.

vLLM keeps the scheduler in this process and starts one more for each device. Those import this file by the name RANK. Knows
vLLM's worker classes; knows nothing of training.
"""

import multiprocessing
import os
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from actors.engine import check_adapter
from actors.types import Adapter, AdapterLayout
from actors.vllm_internals import AdapterSlot
from actors.vllm_mends import exchange_over_gloo, mend_layers
from rewards.process import bind_to_parent

DEVICE = "cpu" if current_platform.is_cpu() else "cuda"
Worker: Any = resolve_obj_by_qualname(
    {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}[DEVICE]
)
RANK = "actors.vllm_ranks.Rank"


class Rank(Worker):
    """vLLM's worker of one device, with a part of every layer and of the adapter's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        bind_to_parent(parent.pid)
        mend_layers(DEVICE)
        if DEVICE == "cpu":
            exchange_over_gloo()
        else:
            # Ranks show one another what their graphs reduce, which memory that grows in place cannot be.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        super().__init__(*args, **kwargs)

    def init_device(self) -> None:
        super().init_device()
        if DEVICE == "cuda":
            torch.cuda.set_per_process_memory_fraction(self.vllm_config.additional_config["share_of_memory"])

    def open_slot(self, layout: AdapterLayout, memory: str, dtype: torch.dtype) -> None:
        """Prepare this device's buffers for adapters that come through `memory`."""
        self._slot, self._flat = AdapterSlot(self, layout), _mapped(memory, layout.size, dtype)

    def fill_slot(self) -> None:
        """Copy in what lies in the memory now."""
        self._slot.copy(self._flat)


class SpreadSlot:
    """An AdapterSlot for all ranks of `engine`. The adapter goes through memory that they share and that has no name, so that
    nothing is left when they die."""

    def __init__(self, engine: Any, layout: AdapterLayout) -> None:
        self._layout = layout
        self._executor = engine.engine_core.engine_core.model_executor
        dtype = engine.vllm_config.model_config.dtype  # theirs: a rank has one thread, too few to convert so much
        self._file = os.memfd_create("adapter")
        os.ftruncate(self._file, layout.size * dtype.itemsize)
        memory = f"/proc/{os.getpid()}/fd/{self._file}"
        self._flat = _mapped(memory, layout.size, dtype)
        self._executor.collective_rpc("open_slot", args=(layout, memory, dtype))

    def write(self, adapter: Adapter) -> None:
        """Copy the adapter in on all devices, after the steps that are under way. Raises AdapterError before anything is
        changed."""
        check_adapter(adapter, self._layout)
        self._flat.copy_(adapter.flat)
        self._executor.collective_rpc("fill_slot")


def _mapped(path: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`size` values in a file that others map, too."""
    return torch.from_file(path, shared=True, size=size, dtype=dtype)
