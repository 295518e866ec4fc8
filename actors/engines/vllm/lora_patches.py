"""Changes to vLLM's LoRA layers and to its loader of nf4 weights; patches.py holds those to the rest of the engine.

Each is made before a model's layers are made, and is idempotent. Knows vLLM 0.25 to 0.33 and vllm-bnb-plugin; knows
nothing of training.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from actors.engines.base import EngineUnavailable
from actors.engines.vllm.lora_linear import supports
from actors.models.families import ModelFamily
from actors.models.nf4_scales import BLOCK, can_join, join_scales

if TYPE_CHECKING:
    from vllm.lora.layers.utils import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from actors.engines.vllm.interfaces import LoraLinear

# vLLM's own module up to 0.27, and the plugin's after.
BITSANDBYTES_CONFIG = ("vllm.model_executor.layers.quantization.bitsandbytes", "vllm_bnb_plugin.quantization.config")
BITSANDBYTES_LOADER = ("vllm.model_executor.model_loader.bitsandbytes_loader", "vllm_bnb_plugin.bitsandbytes_loader")


def patch_lora_layers() -> None:
    """Make each LoRA layer one operation (lora_linear.py) for the one adapter that every request carries.

    Relies on `create_lora_weights`, `_apply_sync` and `output_slices` of the LoRA layers, whose buffers become views of
    one A and one B.

    Cause: vLLM launches a fill, a shrink and an expand beside each layer's product, and for nf4 one product (or an
        unpacking and a product) a slice.
    Upstream: https://github.com/vllm-project/vllm/pull/38432 (shrink and expand in one call; closed without a merge).
    Remove when: vLLM computes a layer and its only adapter in as few launches, for nf4 too.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as Layer

    if getattr(Layer, "_is_one_operation", False):
        return
    stock_apply: Callable[..., torch.Tensor] = Layer._apply_sync

    def joining(stock: Callable[..., None]) -> Callable[..., None]:
        def create_lora_weights(self: LoraLinear, *args: object, **kwargs: object) -> None:
            stock(self, *args, **kwargs)
            if type(self).create_lora_weights is create_lora_weights:  # type: ignore[attr-defined] - no parent's call
                self.is_joined = _join(self)

        return create_lora_weights

    def _apply_sync(self: LoraLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.is_joined:
            return stock_apply(self, x, bias)
        out = torch.ops.epiphany.lora_linear(
            x.reshape(-1, x.shape[-1]),
            self.plain_weight,
            self.nf4_scales,
            bias,
            self.joined_a,
            self.joined_b,
            self.widths,
        )
        return out.view(*x.shape[:-1], out.shape[-1])

    classes: list[type] = [Layer]
    for layer in classes:
        classes += layer.__subclasses__()
        if "create_lora_weights" in layer.__dict__:
            layer.create_lora_weights = joining(layer.create_lora_weights)  # type: ignore[attr-defined]
    Layer._apply_sync = _apply_sync  # type: ignore[method-assign]
    Layer._is_one_operation = True  # type: ignore[attr-defined]


def _join(layer: LoraLinear) -> bool:
    """Lay the adapter's slices end to end. Returns whether lora_linear can compute this layer."""
    base, slices, rank = layer.base_layer, len(layer.lora_a_stacked), layer.lora_a_stacked[0].shape[2]
    layer.nf4_scales = getattr(base, "nf4_scales", [])
    layer.plain_weight = base.weight.data
    is_plain = layer.plain_weight.dim() == 2 and layer.plain_weight.dtype in (torch.bfloat16, torch.float16)
    if not (layer.nf4_scales or is_plain) or not supports(layer.input_size, rank, slices):
        return False
    layer.joined_a = torch.cat([a[0, 0] for a in layer.lora_a_stacked])
    layer.joined_b = torch.cat([b[0, 0] for b in layer.lora_b_stacked])
    layer.widths = [b.shape[2] for b in layer.lora_b_stacked]
    layer.lora_a_stacked = tuple(a[None, None] for a in layer.joined_a.split(rank))
    layer.lora_b_stacked = tuple(b[None, None] for b in layer.joined_b.split(layer.widths))
    return True


def patch_cpu_lora() -> None:
    """Replace the CPU LoRA kernel, which gathers one copy of the weights per token, by a matmul per adapter.

    Cause: the stock kernel is about four times slower than the base model, and gives base requests (index -1) the last
        adapter when they share a batch with LoRA requests.
    Upstream: https://github.com/vllm-project/vllm/pull/48421 (the wrong adapter; none filed on the speed).
    Remove when: vllm/lora/ops/torch_ops groups tokens by adapter.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if getattr(PunicaWrapperCPU, "_groups_by_adapter", False):
        return
    stock_update = PunicaWrapperCPU.update_metadata

    def update_metadata(
        self: PunicaWrapperCPU, mapping: LoRAMapping, lora_index_to_id: list[int | None], *args: int, **kwargs: int
    ) -> None:
        stock_update(self, mapping, lora_index_to_id, *args, **kwargs)
        ids = set(mapping.index_mapping)
        groups: list[tuple[int, slice | torch.Tensor]]
        if len(ids) == 1:
            groups = [(lora_index_to_id.index(i), slice(None)) for i in ids if i > 0]
        else:
            token_ids = torch.tensor(mapping.index_mapping)
            groups = [(lora_index_to_id.index(i), (token_ids == i).nonzero()[:, 0]) for i in ids if i > 0]
        self._groups = groups  # type: ignore[attr-defined]

    def add_lora_linear(
        self: PunicaWrapperCPU,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        scale: float,
        slices: Sequence[int],
        **_: object,
    ) -> None:
        for slot, rows in self._groups:  # type: ignore[attr-defined]
            x_rows, offset = x[rows], 0
            for a, b, width in zip(lora_a, lora_b, slices, strict=True):
                delta = (x_rows @ a[slot, 0].T) @ b[slot, 0].T
                y[rows, offset : offset + width] += delta.mul_(scale) if scale != 1 else delta
                offset += width

    PunicaWrapperCPU.update_metadata = update_metadata  # type: ignore[method-assign]
    PunicaWrapperCPU.add_lora_linear = add_lora_linear  # type: ignore[method-assign]
    PunicaWrapperCPU._groups_by_adapter = True  # type: ignore[attr-defined]


def patch_nf4_loader(*, quantized_scales: bool) -> None:
    """Let the loader leave `nf4_scales` on each nf4 layer: the scales of its slices end to end, as LoraLayer has them.

    With `quantized_scales` they stay as double quantization has them, where slices allow it. Relies on
    `_bind_quant_states_to_params` and `_dequantize_dq`, and on the `bnb_quant_state` of each weight, whose tensors
    become views.

    Cause: the loader keeps the scales of each slice in a tensor of its own, and lora_linear reads them as one; and it
        unpacks double quantization, which takes four times the memory of the scales.
    Upstream: none filed.
    Remove when: `patch_lora_layers` is removed.
    """
    loader = _import_bitsandbytes("BitsAndBytesModelLoader", BITSANDBYTES_LOADER)
    stock, unpack = loader.__dict__.get("_epiphany_stock", (loader._bind_quant_states_to_params, loader._dequantize_dq))

    def bind(self: object, model: torch.nn.Module, quant_states: object) -> None:
        stock(self, model, quant_states)
        for module in model.modules():
            states = getattr(getattr(module, "weight", None), "bnb_quant_state", None)
            if isinstance(states, dict):
                parts = [states[i] for i in range(len(states))]
                if not (quantized_scales and can_join(parts)):
                    unpack(self, states)
                if all(s.quant_type == "nf4" and s.blocksize == BLOCK for s in parts):
                    vars(module)["nf4_scales"] = join_scales(parts)

    loader._bind_quant_states_to_params = bind
    loader._dequantize_dq = lambda _, states: states
    loader._epiphany_stock = stock, unpack


def patch_nf4_skipped_modules(modules: Iterable[str], *, family: ModelFamily) -> None:
    """Name the linear layers that in-flight nf4 quantization leaves alone; a quantized checkpoint's own list stays.

    Cause: vLLM reads `BitsAndBytesConfig.llm_int8_skip_modules` from checkpoints only, by the names of fused layers.
    Upstream: none filed; https://github.com/vllm-project/vllm/pull/12974 brought the list for checkpoints.
    Remove when: an engine argument carries the list.
    """
    config = _import_bitsandbytes("BitsAndBytesConfig", BITSANDBYTES_CONFIG)
    stock = config.__dict__.get("_epiphany_stock", config.__init__)
    names: set[str] = set()
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        names |= {module, f"{parent}.{family.fused_name(leaf) or ''}"}

    def __init__(self: Any, *args: object, **kwargs: object) -> None:
        stock(self, *args, **kwargs)
        self.llm_int8_skip_modules = [*self.llm_int8_skip_modules, *sorted(names)]

    config._epiphany_stock = stock
    config.__init__ = __init__


def _import_bitsandbytes(name: str, modules: Sequence[str]) -> Any:
    """The class `name` of the first module that can be imported. Raises EngineUnavailable."""
    for module in modules:
        with contextlib.suppress(ImportError):
            return getattr(importlib.import_module(module), name)
    raise EngineUnavailable("this vLLM needs the package vllm-bnb-plugin for nf4; install it, or use vllm<0.28")
