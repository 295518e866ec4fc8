"""The LoRA layers of the policy in as few kernels as there are products.

PEFT's layer casts both matrices, multiplies, scales and adds in separate kernels, and a small model spends its time
launching them. Here the whole adapter is cast once a forward pass, the scale rides on the products, and backward adds
straight into the flat gradient. Knows PEFT's layers; knows nothing of models. Suffixes: S stream, R rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from actors.lora import PREFIX, FlatLora


class _LoraLinear(torch.autograd.Function):
    """base(x) + scaling * (x A^T) B^T, where the output of the frozen base layer is given."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: torch.Tensor, matrices: "_Matrices", _anchor: torch.Tensor
    ) -> torch.Tensor:
        x_SI = x.reshape(-1, x.shape[-1])
        down_SR = x_SI @ matrices.a.T
        ctx.save_for_backward(x_SI, down_SR)
        ctx.matrices, ctx.shape = matrices, x.shape
        out_SO = torch.addmm(base.reshape(-1, base.shape[-1]), down_SR, matrices.b.T, alpha=matrices.scaling)
        return out_SO.view(base.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        x_SI, down_SR = ctx.saved_tensors
        m, (gradient,) = ctx.matrices, gradients
        gradient_SO = gradient.reshape(-1, gradient.shape[-1])
        up_SR = gradient_SO @ m.b
        _accumulate(m.gradient_a, up_SR, x_SI, m.scaling)
        _accumulate(m.gradient_b, gradient_SO, down_SR, m.scaling)
        to_x = (up_SR @ m.a).mul_(m.scaling).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, gradient, None, None


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """total += scaling * left^T right, in float32."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right, alpha=scaling)
    else:
        total.add_(left.T @ right, alpha=scaling)


@dataclass(frozen=True)
class _Matrices:
    """A [R, in] and B [out, R] of one layer in the compute dtype, and where their gradients go."""

    a: torch.Tensor
    b: torch.Tensor
    gradient_a: torch.Tensor
    gradient_b: torch.Tensor
    scaling: float


class FastLora:
    """Makes every LoRA layer of `lora` run through _LoraLinear. Call `refresh` before each forward pass."""

    def __init__(self, lora: FlatLora, dtype: torch.dtype) -> None:
        self._lora = lora
        flat = lora.flat.detach()
        self._compute = flat if dtype == torch.float32 else torch.empty_like(flat, dtype=dtype)
        assert lora.flat.grad is not None
        gradient = lora.flat.grad
        views: dict[str, list[torch.Tensor]] = {}
        for entry in lora.layout.entries:
            views.setdefault(entry.module, []).extend(entry.view(x) for x in (self._compute, gradient))
        for name, (a, gradient_a, b, gradient_b) in views.items():
            matrices = _Matrices(a, b, gradient_a, gradient_b, lora.layout.scaling)
            layer: Any = lora.model.get_submodule(PREFIX + name)
            layer.forward = _forward(layer, matrices, lora.flat)

    def refresh(self) -> None:
        """Cast the adapter as it is now."""
        if self._compute.dtype != torch.float32:
            self._compute.copy_(self._lora.flat.detach())


def _forward(layer: Any, matrices: _Matrices, anchor: torch.Tensor) -> Any:
    base = layer.base_layer
    is_plain = type(base) is torch.nn.Linear

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = F.linear(x, base.weight, base.bias) if is_plain else base(x)
        # The anchor requires a gradient, so that the layer takes part in backward even where x does not.
        return result if layer.disable_adapters else _LoraLinear.apply(x, result, matrices, anchor)  # type: ignore[return-value]

    return forward
