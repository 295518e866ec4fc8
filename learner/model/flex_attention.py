"""Packed attention by torch's flex attention, for soft caps, sinks and wide heads on a GPU.

It compiles a kernel for each kind of scores at first use. Knows tensors only. Suffix: S stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, create_block_mask, flex_attention

from learner.packing import Packing

if TYPE_CHECKING:
    from learner.model.attention import Scores


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scores: Scores, packing: Packing
) -> torch.Tensor:
    """query [1, heads, S, D], key and value [1, kv heads, S, D] -> [1, S, heads, D]."""
    output, aux = _compiled()(
        query,
        key,
        value,
        score_mod=None if scores.softcap is None else _cap(scores.softcap),
        block_mask=_block_mask(packing, scores.window),
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if scores.sinks is not None:
        assert aux.lse is not None
        # One more key without a value takes its share of the weights.
        kept = torch.sigmoid(aux.lse - scores.sinks.float()[None, :, None])
        output = output * kept[..., None].to(output.dtype)
    return output.transpose(1, 2)


@functools.cache
def _cap(softcap: float) -> Callable[..., torch.Tensor]:
    """The same function for the same value, so that it is compiled once."""

    def capped(
        score: torch.Tensor, _batch: torch.Tensor, _head: torch.Tensor, _q: torch.Tensor, _k: torch.Tensor
    ) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@functools.cache
def _compiled() -> Callable[..., tuple[torch.Tensor, AuxOutput]]:
    compiled = torch.compile(flex_attention)
    return cast("Callable[..., tuple[torch.Tensor, AuxOutput]]", compiled)


def _block_mask(packing: Packing, window: int | None) -> BlockMask:
    """Which blocks of the stream see which, computed once for a stream and a window."""
    mask = packing.block_masks.get(window)
    if isinstance(mask, BlockMask):
        return mask
    starts, prefix_starts, prefix_lengths, places = packing.layout

    def sees(_batch: torch.Tensor, _head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        in_prefix = (k >= prefix_starts[q]) & (k < prefix_starts[q] + prefix_lengths[q])
        visible = in_prefix | ((k >= starts[q]) & (k <= q))
        return visible if window is None else visible & (places[q] - places[k] < window)

    length = len(places)
    packing.block_masks[window] = made = create_block_mask(sees, None, None, length, length, device=packing.device)
    return made
