"""vLLM's undocumented objects, as far as this package uses them: what a new version of vLLM may break.

Types only. Each attribute is named as vLLM names it. Knows vLLM 0.25 to 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.lora.request import LoRARequest


class LoraSlices(Protocol):
    """A layer wrapped for LoRA.

    The matrices of `lora_a_stacked` are [slot, 1, rank, in], those of `lora_b_stacked` [slot, 1, out, rank].
    """

    lora_a_stacked: tuple[torch.Tensor, ...]
    lora_b_stacked: tuple[torch.Tensor, ...]
    tp_size: int
    slice_lora_a: Callable[..., torch.Tensor | Sequence[torch.Tensor]]
    slice_lora_b: Callable[..., torch.Tensor | Sequence[torch.Tensor]]


class BaseLayer(Protocol):
    """The layer inside a LoRA layer."""

    weight: torch.nn.Parameter


class LoraLinear(LoraSlices, Protocol):
    """A wrapped linear layer. The attributes from `is_joined` on are added by lora_patches.py."""

    base_layer: BaseLayer
    input_size: int
    is_joined: bool
    plain_weight: torch.Tensor
    nf4_scales: list[torch.Tensor]
    joined_a: torch.Tensor
    joined_b: torch.Tensor
    widths: list[int]


class StackedLinear(Protocol):
    """A linear layer whose rows are those of several layers."""

    output_sizes: list[int]


class PaddedVocabulary(Protocol):
    """An embedding or head whose rows beyond `org_vocab_size` are padding."""

    org_vocab_size: int


class AdapterManager(Protocol):
    packed_modules_mapping: Mapping[str, list[str]]
    modules: Mapping[str, LoraSlices]
    lora_index_to_id: list[int | None]

    def list_adapters(self) -> Mapping[int, object]: ...
    def activate_adapter(self, lora_id: int) -> bool: ...


class WorkerLoraManager(Protocol):
    _adapter_manager: AdapterManager

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool: ...


class ModelConfig(Protocol):
    hf_config: PreTrainedConfig


class ModelRunner(Protocol):
    lora_manager: WorkerLoraManager
    model: torch.nn.Module
    model_config: ModelConfig


class EngineConfig(Protocol):
    additional_config: Mapping[str, object]


class DeviceWorker(Protocol):
    model_runner: ModelRunner
    vllm_config: EngineConfig


class ScheduledRequest(Protocol):
    request_id: str
    num_computed_tokens: int
    num_output_tokens: int
    num_output_placeholders: int


class SingleTypeManager(Protocol):
    req_to_blocks: Mapping[str, Sequence[object]]
    block_size: int


class CacheCoordinator(Protocol):
    single_type_managers: Sequence[SingleTypeManager]


class CacheManager(Protocol):
    coordinator: CacheCoordinator
    empty_kv_cache_blocks: object
    allocate_slots: Callable[..., object]


class Scheduler(Protocol):
    requests: Mapping[str, ScheduledRequest]
    kv_cache_manager: CacheManager
    _preempt_request: Callable[..., None]


class Executor(Protocol):
    """`driver_worker` is there with one device only."""

    driver_worker: WorkerWrapper

    def collective_rpc(self, method: str, args: tuple[object, ...] = ()) -> list[object]: ...


class WorkerWrapper(Protocol):
    worker: DeviceWorker


class EngineCore(Protocol):
    scheduler: Scheduler
    model_executor: Executor


class PoolingWorker(Protocol):
    _maybe_get_memory_pool_context: Callable[..., AbstractContextManager[object]]
