"""The linear layers of the policy in as few kernels as there are products.

PEFT's LoRA layer casts both matrices, multiplies, scales and adds in separate kernels, and a small model spends its
time launching them. Here the whole adapter is cast once per forward pass, scaling and sums are fused into the products,
an nf4 weight is dequantized where it is used and never stored, and backward adds to the flat gradient directly. Layers
without an adapter ask for their weight in the same way. Knows PEFT's layers; knows nothing of models. Suffixes: S
stream, I in, O out, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from actors.models.loading import decoder_layers
from actors.models.lora import PREFIX, FlatLora


class _BaseLinear(Protocol):
    weight: torch.Tensor
    bias: torch.Tensor | None


class _PeftLayer(Protocol):
    """PEFT's LoRA layer around a linear layer."""

    base_layer: _BaseLinear
    forward: Callable[[torch.Tensor], torch.Tensor]

    @property
    def disable_adapters(self) -> bool: ...


@dataclass(frozen=True)
class _Layer:
    """A frozen linear layer with its adapter.

    `weight()` is [O, I] in the compute dtype; `a` [R, I] and `b` [O, R], which is times `scaling` already, are the
    adapter in the compute dtype; the gradients of the adapter itself (float32) are added to `gradient_a` and
    `gradient_b`.
    """

    weight: Callable[[], torch.Tensor]
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    gradient_a: torch.Tensor
    gradient_b: torch.Tensor
    scaling: float


class _Context(Protocol):
    """What torch passes to an autograd function, and what _LoraLinear adds to it."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[torch.Tensor, ...]
    layer: _Layer
    shape: torch.Size

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * (x A^T) B^T."""

    @staticmethod
    def forward(ctx: _Context, x: torch.Tensor, layer: _Layer, _anchor: torch.Tensor) -> torch.Tensor:
        x_SI = x.reshape(-1, x.shape[-1])
        down_SR = x_SI @ layer.a.T
        out_SO = F.linear(x_SI, layer.weight(), layer.bias).addmm_(down_SR, layer.b.T)
        ctx.save_for_backward(x_SI, down_SR)
        ctx.layer, ctx.shape = layer, x.shape
        return out_SO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        x_SI, down_SR = ctx.saved_tensors
        layer, gradient = ctx.layer, gradients[0]
        gradient_SO = gradient.reshape(-1, gradient.shape[-1])
        up_SR = gradient_SO @ layer.b
        _accumulate(layer.gradient_a, up_SR, x_SI)
        _accumulate(layer.gradient_b, gradient_SO, down_SR, scaling=layer.scaling)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        gradient_SI = (gradient_SO @ layer.weight()).addmm_(up_SR, layer.a)
        return gradient_SI.view(ctx.shape), None, None


class _FrozenContext(Protocol):
    """What _FrozenLinear adds to what torch passes."""

    weight: Callable[[], torch.Tensor]


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias, of a layer without an adapter. The weight is asked for again in backward: it may be unpacked, or
    gathered from other ranks, and must not be kept until then.
    """

    @staticmethod
    def forward(
        ctx: _FrozenContext, x: torch.Tensor, weight: Callable[[], torch.Tensor], bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx: _FrozenContext, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0] @ ctx.weight(), None, None


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, scaling: float = 1.0) -> None:
    """total += scaling * left^T right, in float32."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right, alpha=scaling)
    else:
        total.add_(left.T @ right, alpha=scaling)


class FastLora:
    """Makes every LoRA layer of `lora` compute in `dtype` by _LoraLinear. Call `cast_weights` before each forward pass.

    `slots` are tensors of an engine that hold its copy of the adapter in `dtype`, one for each entry of the layout, B
    times the scaling: the adapter is cast into them rather than into a buffer of its own, and the engine must have no
    unfinished sequence when it is.
    """

    def __init__(self, lora: FlatLora, dtype: torch.dtype, slots: Sequence[torch.Tensor] | None = None) -> None:
        layout, flat, gradient = lora.layout, lora.flat.detach(), lora.flat.grad
        assert gradient is not None
        if slots is None:
            own = torch.empty_like(flat, dtype=dtype)
            slots = [entry.view(own) for entry in layout.entries]
        self._slots = list(slots)
        self._weights = [entry.view(flat) for entry in layout.entries]
        self._scaled = [slot for slot, entry in zip(slots, layout.entries, strict=True) if entry.side == "B"]
        self._scaling = layout.scaling
        views: dict[str, list[torch.Tensor]] = {}
        for entry, slot in zip(layout.entries, slots, strict=True):
            views.setdefault(entry.module, []).extend((slot, entry.view(gradient)))
        for name, (a, gradient_a, b, gradient_b) in views.items():
            peft_layer = cast("_PeftLayer", lora.model.get_submodule(PREFIX + name))
            base = peft_layer.base_layer
            layer = _Layer(_weight(base, dtype), base.bias, a, b, gradient_a, gradient_b, layout.scaling)
            peft_layer.forward = _forward(peft_layer, layer, anchor=lora.flat)
        for module in _without_adapter(lora):
            module.forward = _frozen_forward(module, _weight(cast("_BaseLinear", module), dtype))

    def cast_weights(self) -> None:
        """Copy the adapter's current weights into the compute dtype."""
        torch._foreach_copy_(self._slots, self._weights)
        if self._scaling != 1:
            torch._foreach_mul_(self._scaled, self._scaling)


def _weight(base: _BaseLinear, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    quantization_state = getattr(base.weight, "quant_state", None)
    if quantization_state is None:
        return lambda: base.weight
    from bitsandbytes.functional import dequantize_4bit

    return lambda: dequantize_4bit(base.weight.data, quantization_state).to(dtype)


def _without_adapter(lora: FlatLora) -> list[torch.nn.Module]:
    """The linear layers of the decoder's layers that have no adapter."""
    base = cast("PreTrainedModel", lora.model.get_base_model())
    return [
        module
        for layer in decoder_layers(base)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and not name.endswith("base_layer")
    ]


def _frozen_forward(
    module: torch.nn.Module, weight: Callable[[], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = cast("_BaseLinear", module).bias

    def forward(x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", _FrozenLinear.apply(x, weight, bias))

    return forward


def _forward(peft_layer: _PeftLayer, layer: _Layer, *, anchor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if peft_layer.disable_adapters:
            return F.linear(x, layer.weight(), layer.bias)
        # The anchor requires a gradient, so that the layer takes part in backward even if x does not.
        return cast("torch.Tensor", _LoraLinear.apply(x, layer, anchor))

    return forward
