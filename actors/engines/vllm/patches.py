"""Changes to vLLM's engine, scheduler and workers; lora_patches.py holds those to its LoRA layers and nf4 loader.

Each is made before or right after an engine starts, and is idempotent. Knows vLLM 0.25 to 0.33; knows nothing of
training.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.engines.vllm.internals import engine_core
from actors.engines.vllm.lora_linear import can_use_kernels
from actors.engines.vllm.lora_patches import patch_cpu_lora, patch_lora_layers
from actors.models.host_memory import move_to_host

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.config.lora import LoRAConfig

    from actors.engines.vllm.interfaces import DeviceWorker, PoolingWorker, ScheduledRequest


EMBEDDING_ON_HOST = "epiphany_embedding_on_host"  # in an engine's additional_config


def patch_process(device: str) -> None:
    """All that a process needs before it makes a model's layers."""
    patch_transformers_backend()
    if device == "cpu":
        patch_cpu_lora()
        return
    patch_logprob_kernel()
    patch_graph_capture()
    patch_embedding()
    if can_use_kernels():
        patch_lora_layers()


def patch_transformers_backend() -> None:
    """Let a class of transformers that vLLM computes with be made and called outside of vLLM, too.

    Cause: `_decorate_cls_for_torch_compile` changes transformers' own class, which then needs vLLM's configuration.
    Upstream: none filed.
    Remove when: the backend decorates a class of its own.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.models.transformers import base

    stock = base.Base._decorate_cls_for_torch_compile
    if getattr(stock, "_spares_transformers", False):
        return

    def decorate(self: object, cls: type, *args: object, **kwargs: object) -> None:
        plain: Callable[..., None] = cls.__init__  # type: ignore[misc]
        stock(self, cls, *args, **kwargs)  # type: ignore[arg-type]
        decorated: Callable[..., None] = cls.__init__  # type: ignore[misc]
        if decorated is plain:
            return

        @functools.wraps(plain)
        def __init__(self: object, *args: object, **kwargs: object) -> None:
            (plain if get_current_vllm_config_or_none() is None else decorated)(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        cls.do_not_compile = True  # type: ignore[attr-defined] - of those that are not vLLM's

    decorate._spares_transformers = True  # type: ignore[attr-defined]
    base.Base._decorate_cls_for_torch_compile = decorate  # type: ignore[method-assign]


def patch_cpu_communicator() -> None:
    """Let the processes of an engine on CPUs communicate through gloo.

    Cause: vLLM's own segments of shared memory are waited on by spinning, which takes the core that another process
        needs, and remain when a process dies.
    Upstream: none filed; https://github.com/vllm-project/vllm/pull/34169 added the condition that is answered here.
    Remove when: CpuCommunicator has an option to use torch.distributed.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False  # type: ignore[method-assign]


def patch_cpu_repacking() -> None:
    """Let the CPU build compute with the weights as they were loaded.

    Cause: `dispatch_cpu_unquantized_gemm` repacks weights for oneDNN and frees the plain ones, so that the learner
        could not use them.
    Upstream: none filed.
    Remove when: vLLM has an option that keeps the plain weights.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False  # type: ignore[assignment]


def patch_logprob_kernel() -> None:
    """Read the logits in larger blocks for the sampled token's log-probability, and do not rank that token.

    Cause: `_topk_log_softmax_kernel` reduces 1,024 logits at a time with four warps, which takes longer than a layer of
        the model does; `selected_token_ranks` are computed, but not used here.
    Upstream: https://github.com/vllm-project/vllm/issues/55577 (the same kernel on prompts).
    Remove when: the kernel chooses its block by the size of the vocabulary, and ranks are optional.
    """
    logprob = importlib.import_module("vllm.v1.worker.gpu.sample.logprob")
    stock = logprob._topk_log_softmax_kernel
    if isinstance(stock, _Launcher):
        return

    def in_larger_blocks(grid: object) -> Callable[..., None]:
        return lambda *args, **options: stock[grid](*args, **{**options, "BLOCK_SIZE": 8192, "num_warps": 16})

    vars(logprob)["_topk_log_softmax_kernel"] = _Launcher(in_larger_blocks)
    vars(logprob)["_ranks_kernel"] = _Launcher(lambda _: lambda *_, **__: None)


@dataclass(frozen=True)
class _Launcher:
    """Stands for a Triton kernel: indexed by a grid, it gives a function."""

    launch: Callable[[object], Callable[..., None]]

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch(grid)


def patch_graph_capture() -> None:
    """Capture no CUDA graphs of steps without an adapter: here every request has it.

    Cause: without `cudagraph_specialize_lora` the first model runner captures one case, the second
        (`get_lora_capture_cases`) two, which doubles the memory of the graphs.
    Upstream: https://github.com/vllm-project/vllm/pull/32005 brought the two cases; none filed on this.
    Remove when: the second model runner captures one case without `cudagraph_specialize_lora`, as the first does.
    """
    from vllm.v1.worker.gpu import model_runner

    def only_with_adapter(lora_config: LoRAConfig, _: object) -> list[int]:
        return [lora_config.max_loras + 1]

    model_runner.get_lora_capture_cases = only_with_adapter  # type: ignore[assignment]


def patch_sleep_mode() -> None:
    """Keep the weights out of the memory that vLLM's sleep mode gives back: the learner computes with them.

    Cause: `_maybe_get_memory_pool_context` pools weights and key-value cache alike; level 1 then moves the weights to
        the host.
    Upstream: https://github.com/vllm-project/vllm/pull/44890 adds `release_kv_cache_memory`, which keeps the weights.
    Remove when: the oldest supported vLLM has `LLMEngine.release_kv_cache_memory`.
    """
    from vllm.v1.worker.gpu_worker import Worker

    stock = Worker._maybe_get_memory_pool_context
    if getattr(stock, "_spares_weights", False):
        return

    def pool_context(self: PoolingWorker, tag: str) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if tag == "weights" else stock(self, tag)  # type: ignore[arg-type]

    pool_context._spares_weights = True  # type: ignore[attr-defined]
    Worker._maybe_get_memory_pool_context = pool_context  # type: ignore[method-assign]


def patch_embedding() -> None:
    """Move the embedding of a model to the host's memory as soon as it is loaded (actors/models/host_memory.py), before
    CUDA graphs are captured and the cache takes its memory.

    It does so in engines whose `additional_config` says EMBEDDING_ON_HOST.

    Cause: the embedding takes as much of the card as the head, and a step reads a few of its rows.
    Upstream: none filed; `cpu_offload_gb` and `cpu_offload_params` move whole layers.
    Remove when: an engine argument moves the embedding.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.v1.worker.gpu_worker import Worker

    stock = Worker.load_model
    if getattr(stock, "_moves_embedding", False):
        return

    def load_model(self: DeviceWorker, *args: object, **kwargs: object) -> None:
        stock(self, *args, **kwargs)  # type: ignore[arg-type]
        if not self.vllm_config.additional_config.get(EMBEDDING_ON_HOST):
            return
        model = self.model_runner.model
        for module in list(model.modules()):
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
                move_to_host(model, module)

    load_model._moves_embedding = True  # type: ignore[attr-defined]
    Worker.load_model = load_model  # type: ignore[method-assign,assignment]


@dataclass
class Counter:
    count: int = 0


def patch_preemption(engine: LLMEngine) -> Counter:
    """Count how often a running sequence has to wait because the cache is full.

    Cause: vLLM counts them in statistics that cost time in every step, and that are off here.
    Upstream: none filed; https://github.com/vllm-project/vllm/pull/10169 logs a warning of each.
    Remove when: a finished request says how often it was preempted.
    """
    scheduler, preemptions = engine_core(engine).scheduler, Counter()
    stock = scheduler._preempt_request

    def preempt(request: ScheduledRequest, *args: object, **kwargs: object) -> None:
        preemptions.count += 1
        stock(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return preemptions


def patch_allocate_slots(engine: LLMEngine) -> None:
    """Let a decoding token that fits into its sequence's last block pass `allocate_slots` at once.

    The next token that needs a block takes the full path, which catches up on the tokens before it.

    Cause: the scheduler asks the block pool, the prefix cache and each cache group for every token of every sequence,
        which takes a quarter of its time.
    Upstream: https://github.com/vllm-project/vllm/pull/29206 (closed without a merge).
    Remove when: `KVCacheManager.allocate_slots` returns early where no block is needed.
    """
    manager = engine_core(engine).scheduler.kv_cache_manager
    managers = manager.coordinator.single_type_managers
    if len(managers) != 1 or type(managers[0]).__name__ != "FullAttentionManager":
        return  # sliding windows free blocks as they move
    blocks_of, block_size = managers[0].req_to_blocks, managers[0].block_size
    no_blocks = manager.empty_kv_cache_blocks
    stock = manager.allocate_slots

    def allocate_slots(request: ScheduledRequest, num_new_tokens: int, *args: object, **kwargs: object) -> object:
        if num_new_tokens == 1 and not args and kwargs == {"num_lookahead_tokens": 0}:
            blocks = blocks_of.get(request.request_id)
            if blocks is not None and request.num_computed_tokens < len(blocks) * block_size:
                return no_blocks
        return stock(request, num_new_tokens, *args, **kwargs)

    manager.allocate_slots = allocate_slots
