"""MLPs in tiles over the sequence: of a long stream, the activations of one tile exist at a time.

Within gradient checkpointing it costs nothing where an MLP is the last part of its layer: recomputation ends at the
MLP's input, and each tile is recomputed when its gradient is. Where a norm follows (Gemma, OLMo, GLM-4), the MLP is
computed once more. Knows torch and the layout of transformers' decoders.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from transformers import PreTrainedModel

from actors.models.families import family_of
from actors.models.loading import decoder_layers

Function = Callable[[torch.Tensor], torch.Tensor]


class _KeepsInput(Protocol):
    """What torch passes to _Keep."""

    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _Context(Protocol):
    """What torch passes to _Tiled, and what that adds."""

    kept: _KeepsInput
    function: Function
    tile: int


class _Keep(torch.autograd.Function):
    """The identity, which saves its input for _Tiled.

    What an autograd function saves itself is saved after it has computed, so that a recomputation that only wants what
    was saved would compute it, too.
    """

    @staticmethod
    def forward(ctx: _KeepsInput, x: torch.Tensor, contexts: list[_KeepsInput], _anchor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        contexts.append(ctx)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _KeepsInput, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None


class _Tiled(torch.autograd.Function):
    """A function of each token, [1, S, hidden] -> [1, S, hidden], computed again in backward."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: torch.Tensor,
        contexts: list[_KeepsInput],
        function: Function,
        tile: int,
        _anchor: torch.Tensor,
    ) -> torch.Tensor:
        (ctx.kept,), ctx.function, ctx.tile = contexts, function, tile
        return _in_tiles(function, x, tile)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,) = ctx.kept.saved_tensors
        gradient_x = torch.empty_like(x)
        parts = (tensor.tensor_split(_count(x, ctx.tile), dim=1) for tensor in (x, gradients[0], gradient_x))
        for part, gradient, target in zip(*parts, strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.function(leaf)
            torch.autograd.backward(output, gradient)
            assert leaf.grad is not None
            target.copy_(leaf.grad)
        return gradient_x, None, None, None, None


def tile_mlps(model: PreTrainedModel, anchor: torch.Tensor, *, tile: int) -> None:
    """Compute the MLPs of `model`, which has checkpointing, in tiles of `tile` tokens at most.

    Experts stay whole. `anchor` requires a gradient, so that the adapter of an MLP gets one even if its input needs
    none.
    """
    if family_of(model.config).has_experts:
        return
    for layer in decoder_layers(model):
        mlp = layer.get_submodule("mlp")
        mlp.forward = _tiled(mlp.forward, anchor, tile)


def _tiled(function: Function, anchor: torch.Tensor, tile: int) -> Function:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= tile:
            return function(x)
        if not torch.is_grad_enabled():
            return _in_tiles(function, x, tile)
        contexts: list[_KeepsInput] = []
        kept = _Keep.apply(x, contexts, anchor)
        return cast("torch.Tensor", _Tiled.apply(kept, contexts, function, tile, anchor))

    return forward


def _in_tiles(function: Function, x: torch.Tensor, tile: int) -> torch.Tensor:
    output = torch.empty_like(x)
    count = _count(x, tile)
    for part, target in zip(x.tensor_split(count, dim=1), output.tensor_split(count, dim=1), strict=True):
        target.copy_(function(part))
    return output


def _count(x: torch.Tensor, tile: int) -> int:
    """Into how many tiles of about the same size the tokens of `x` are split."""
    return -(-x.shape[1] // tile)
