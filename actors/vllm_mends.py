"""Changes to vLLM's own code, each with its cause: the LoRA layers, the nf4 loader, the scheduler's bookkeeping.

vllm_internals.py reads and writes vLLM's objects, vllm_ranks.py extends its workers; no other file touches its inside. All
are made before or right after an engine starts, and twice is as good as once. Knows vLLM 0.25 to 0.33; knows nothing of
training.
"""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors import lora_ops
from actors.vllm_internals import EngineUnavailable


def mend_layers(device: str) -> None:
    """Everything that a process needs before it makes a model's layers."""
    if device == "cpu":
        mend_cpu_lora()
        return
    quicken_logprobs()
    capture_with_adapter()
    if lora_ops.can_use_kernels():
        mend_gpu_lora()


def mend_gpu_lora() -> None:
    """Make each LoRA layer one operation (actors/lora_ops.py) for the one adapter that every request carries.

    vLLM launches a fill, a shrink and an expand beside each layer's product, and for nf4 one product (or an unpacking and a
    product) a slice. Leans on `create_lora_weights`, `_apply_sync` and `output_slices` of the LoRA layers, whose buffers
    become views of one A and one B, and on `_bind_quant_states_to_params` of the bitsandbytes loader, whose scales become
    views of one tensor a layer.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as Layer

    if getattr(Layer, "_is_one_operation", False):
        return
    stock_apply = Layer._apply_sync

    def joining(stock: Any) -> Any:
        def create_lora_weights(self: Any, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            if type(self).create_lora_weights is create_lora_weights:  # not where a subclass calls its parent's
                self.is_joined = _join(self)

        return create_lora_weights

    def _apply_sync(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.is_joined:
            return stock_apply(self, x, bias)
        out = torch.ops.epiphany.lora_linear(
            x.reshape(-1, x.shape[-1]),
            self.plain_weight,
            self.nf4_absmax,
            bias,
            self.joined_a,
            self.joined_b,
            self.widths,
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    classes = [Layer]
    for layer in classes:
        classes += layer.__subclasses__()
        if "create_lora_weights" in layer.__dict__:
            layer.create_lora_weights = joining(layer.create_lora_weights)
    Layer._apply_sync = _apply_sync  # type: ignore[method-assign]
    Layer._is_one_operation = True  # type: ignore[attr-defined]


def _join(layer: Any) -> bool:
    """Lay the adapter's slices end to end. Returns whether lora_linear can do this layer."""
    base, slices, rank = layer.base_layer, len(layer.lora_a_stacked), layer.lora_a_stacked[0].shape[2]
    layer.nf4_absmax = getattr(base, "nf4_absmax", None)
    layer.plain_weight = base.weight.data
    is_plain = layer.plain_weight.dim() == 2 and layer.plain_weight.dtype in (torch.bfloat16, torch.float16)
    if not (layer.nf4_absmax is not None or is_plain) or not lora_ops.fits(layer.input_size, rank, slices):
        return False
    layer.joined_a = torch.cat([a[0, 0] for a in layer.lora_a_stacked])
    layer.joined_b = torch.cat([b[0, 0] for b in layer.lora_b_stacked])
    layer.widths = [b.shape[2] for b in layer.lora_b_stacked]
    layer.lora_a_stacked = tuple(a[None, None] for a in layer.joined_a.split(rank))
    layer.lora_b_stacked = tuple(b[None, None] for b in layer.joined_b.split(layer.widths))
    return True


def join_nf4_scales() -> None:
    """Let the loader leave `nf4_absmax`, the scales of all slices of a layer end to end, on each nf4 layer."""
    loader = _bitsandbytes("BitsAndBytesModelLoader", BITSANDBYTES_LOADER)
    if getattr(loader, "_joins_scales", False):
        return
    stock = loader._bind_quant_states_to_params

    def bind(self: Any, model: Any, states: Any) -> None:
        stock(self, model, states)
        for module in model.modules():
            found = getattr(getattr(module, "weight", None), "bnb_quant_state", None)
            if not isinstance(found, dict):
                continue
            parts = [found[i] for i in range(len(found))]
            if all(s.quant_type == "nf4" and s.blocksize == lora_ops.BLOCK and not s.nested for s in parts):
                module.nf4_absmax = torch.cat([s.absmax for s in parts])
                for state, absmax in zip(parts, module.nf4_absmax.split([len(s.absmax) for s in parts]), strict=True):
                    state.absmax = absmax

    loader._bind_quant_states_to_params = bind
    loader._joins_scales = True


def mend_cpu_lora() -> None:
    """Replace the CPU LoRA kernel, which gathers one copy of the weights per token, by a matmul per adapter.

    The stock kernel is about four times slower than the base model and gives base requests the last adapter when
    they share a batch with LoRA requests (index -1). Remove when vllm/lora/ops/torch_ops groups tokens by adapter.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if getattr(PunicaWrapperCPU, "_groups_by_adapter", False):
        return
    stock_update = PunicaWrapperCPU.update_metadata

    def update_metadata(self: Any, mapping: Any, lora_index_to_id: list, *args: Any, **kwargs: Any) -> None:
        stock_update(self, mapping, lora_index_to_id, *args, **kwargs)
        ids = set(mapping.index_mapping)
        if len(ids) == 1:
            self._groups = [(lora_index_to_id.index(i), slice(None)) for i in ids if i > 0]
        else:
            token_ids = torch.tensor(mapping.index_mapping)
            self._groups = [(lora_index_to_id.index(i), (token_ids == i).nonzero()[:, 0]) for i in ids if i > 0]

    def add_lora_linear(
        self: Any, y: torch.Tensor, x: torch.Tensor, lora_a: Any, lora_b: Any, scale: float, slices: Any, **_: Any
    ) -> None:
        for slot, rows in self._groups:
            x_rows, offset = x[rows], 0
            for a, b, width in zip(lora_a, lora_b, slices, strict=True):
                delta = (x_rows @ a[slot, 0].T) @ b[slot, 0].T
                y[rows, offset : offset + width] += delta.mul_(scale) if scale != 1 else delta
                offset += width

    PunicaWrapperCPU.update_metadata = update_metadata  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = add_lora_linear  # type: ignore[method-assign]
    PunicaWrapperCPU._groups_by_adapter = True  # type: ignore[attr-defined]


def exchange_over_gloo() -> None:
    """Let the processes of an engine on CPUs exchange through gloo, not through vLLM's segments of shared memory: those are
    waited on by spinning, which takes the core that the other one needs, and stay behind when a process dies."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False  # type: ignore[method-assign]


def keep_cpu_weights() -> None:
    """Let the CPU build compute with the weights as they were loaded, instead of repacking them for oneDNN.

    `dispatch_cpu_unquantized_gemm` frees the plain weights after repacking, so that nobody else could use them.
    """
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


def keep_in_16bit(modules: Sequence[str]) -> None:
    """Name the layers that vLLM's in-flight nf4 quantisation leaves alone (`BitsAndBytesConfig.llm_int8_skip_modules`).

    Checkpoints that are quantised already bring their own list, which stays.
    """
    config = _bitsandbytes("BitsAndBytesConfig", BITSANDBYTES_CONFIG)
    stock = config.__dict__.get("_epiphany_stock", config.__init__)
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
             "up_proj": "gate_up_proj"}  # fmt: skip
    names = {name for m in modules for name in (m, m.rpartition(".")[0] + "." + fused.get(m.split(".")[-1], ""))}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.llm_int8_skip_modules = [*self.llm_int8_skip_modules, *sorted(names)]

    config._epiphany_stock = stock
    config.__init__ = __init__


# vLLM's own module up to 0.27, and the plugin's after.
BITSANDBYTES_CONFIG = ("vllm.model_executor.layers.quantization.bitsandbytes", "vllm_bnb_plugin.quantization.config")
BITSANDBYTES_LOADER = ("vllm.model_executor.model_loader.bitsandbytes_loader", "vllm_bnb_plugin.bitsandbytes_loader")


def check_nf4() -> None:
    """Raises EngineUnavailable if this vLLM cannot hold nf4 weights."""
    _bitsandbytes("BitsAndBytesConfig", BITSANDBYTES_CONFIG)


def _bitsandbytes(name: str, modules: Sequence[str]) -> Any:
    for module in modules:
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(module), name)
    raise EngineUnavailable("this vLLM needs the package vllm-bnb-plugin for nf4; install it, or use vllm<0.28")


def quicken_logprobs() -> None:
    """Read the logits in larger blocks for the sampled token's log-probability, and do not rank that token.

    `_topk_log_softmax_kernel` reduces 1,024 logits at a time with four warps, which takes longer than a layer of the
    model does; nobody here reads `selected_token_ranks`.
    """
    logprob: Any = importlib.import_module("vllm.v1.worker.gpu.sample.logprob")
    stock = logprob._topk_log_softmax_kernel
    if isinstance(stock, _Launcher):
        return

    def in_larger_blocks(grid: Any) -> Callable[..., None]:
        return lambda *args, **options: stock[grid](*args, **{**options, "BLOCK_SIZE": 8192, "num_warps": 16})

    logprob._topk_log_softmax_kernel = _Launcher(in_larger_blocks)
    logprob._ranks_kernel = _Launcher(lambda _: lambda *_, **__: None)


def capture_with_adapter() -> None:
    """Capture no CUDA graphs of steps without an adapter, which never come and took half of the graphs' memory.

    Without `cudagraph_specialize_lora` the first model runner captures one case, the second (`get_lora_capture_cases`) two.
    """
    from vllm.v1.worker.gpu import model_runner

    model_runner.get_lora_capture_cases = lambda lora, _: [lora.max_loras + 1]


@dataclass(frozen=True)
class _Launcher:
    """What a Triton kernel is to its caller: something that a grid makes callable."""

    launch: Callable[[Any], Callable[..., None]]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch(grid)


def keep_weights_awake() -> None:
    """Leave the weights out of the memory that vLLM's sleep mode gives back: the learner computes with them.

    `_maybe_get_memory_pool_context` pools weights and key-value cache alike; level 1 then copies weights to the host.
    """
    from vllm.v1.worker.gpu_worker import Worker

    stock = Worker._maybe_get_memory_pool_context
    if getattr(stock, "_spares_weights", False):
        return

    def pool_context(self: Any, tag: str) -> Any:
        return contextlib.nullcontext() if tag == "weights" else stock(self, tag)

    pool_context._spares_weights = True  # type: ignore[attr-defined]
    Worker._maybe_get_memory_pool_context = pool_context  # type: ignore[method-assign]


def skip_idle_bookkeeping(engine: Any) -> None:
    """Let a decoding token whose block is there already pass `allocate_slots` at once.

    vLLM asks its block pool, the prefix cache and each cache group for every token of every sequence, which took a
    quarter of the scheduler's time. The next token that needs a block goes the whole way and catches up on all of it.
    """
    manager = engine.engine_core.engine_core.scheduler.kv_cache_manager
    managers = manager.coordinator.single_type_managers
    if len(managers) != 1 or type(managers[0]).__name__ != "FullAttentionManager":
        return  # sliding windows free blocks as they go
    blocks_of, block_size, nothing_new = (
        managers[0].req_to_blocks,
        managers[0].block_size,
        manager.empty_kv_cache_blocks,
    )
    stock = manager.allocate_slots

    def allocate_slots(request: Any, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if num_new_tokens == 1 and not args and kwargs == {"num_lookahead_tokens": 0}:
            held = blocks_of.get(request.request_id)
            if held is not None and request.num_computed_tokens < len(held) * block_size:
                return nothing_new
        return stock(request, num_new_tokens, *args, **kwargs)

    manager.allocate_slots = allocate_slots
