"""One vLLM engine over several devices: its worker processes, and the way of an adapter into all of them.

vLLM keeps the scheduler in this process and starts one more for each device. Those import this file by WORKER_CLASS.
Knows vLLM's worker classes; knows nothing of training.
"""

import multiprocessing
import os
from typing import TYPE_CHECKING, cast

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from actors.engines.base import check_adapter
from actors.engines.vllm.adapter_slot import AdapterSlot
from actors.engines.vllm.interfaces import DeviceWorker
from actors.engines.vllm.internals import engine_core
from actors.engines.vllm.patches import patch_cpu_communicator, patch_process
from actors.types import Adapter, AdapterLayout
from rewards.process import bind_to_parent

DEVICE = "cpu" if current_platform.is_cpu() else "cuda"
WORKER_CLASS = "actors.engines.vllm.tensor_parallel.Worker"

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker as VllmWorker
else:
    VllmWorker = resolve_obj_by_qualname(
        {"cpu": "vllm.v1.worker.cpu_worker.CPUWorker", "cuda": "vllm.v1.worker.gpu_worker.Worker"}[DEVICE]
    )


class Worker(VllmWorker):
    """vLLM's worker of one device, with a shard of every layer and of the adapter."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        bind_to_parent(parent.pid)
        patch_process(DEVICE)
        if DEVICE == "cpu":
            patch_cpu_communicator()
        else:
            # Custom all-reduce shares the graphs' buffers over CUDA IPC, which expandable segments do not support
            # (https://github.com/vllm-project/vllm/issues/42609).
            torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def init_device(self) -> None:
        super().init_device()
        if DEVICE == "cuda":
            options = cast("dict[str, float]", self.vllm_config.additional_config)
            torch.cuda.set_per_process_memory_fraction(options["memory_fraction"])

    def open_slot(self, layout: AdapterLayout, memory: str, dtype: torch.dtype) -> None:
        """Prepare this device's buffers for adapters that come through `memory`."""
        self._slot = AdapterSlot(cast(DeviceWorker, self), layout)
        self._flat = _map_file(memory, layout.size, dtype)

    def fill_slot(self) -> None:
        """Copy in the adapter that is in the memory now."""
        self._slot.copy(self._flat)


class ShardedAdapterSlot:
    """An AdapterSlot for all workers of `engine`.

    The adapter passes through memory that they share and that has no name, so that nothing is left when they die.
    """

    def __init__(self, engine: "LLMEngine", layout: AdapterLayout) -> None:
        self._layout = layout
        self._executor = engine_core(engine).model_executor
        # Converted here to the workers' dtype: a worker has one thread, too few to convert so much.
        dtype = cast(torch.dtype, engine.vllm_config.model_config.dtype)
        self._file = os.memfd_create("adapter")
        os.ftruncate(self._file, layout.size * dtype.itemsize)
        memory = f"/proc/{os.getpid()}/fd/{self._file}"
        self._flat = _map_file(memory, layout.size, dtype)
        self._executor.collective_rpc("open_slot", args=(layout, memory, dtype))

    def write(self, adapter: Adapter) -> None:
        """Copy the adapter in on all devices, after the steps that are under way.

        Raises AdapterError before anything is changed.
        """
        check_adapter(adapter, self._layout)
        self._flat.copy_(adapter.flat)
        self._executor.collective_rpc("fill_slot")


def _map_file(path: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`size` values in a file that other processes map as well."""
    return torch.from_file(path, shared=True, size=size, dtype=dtype)
