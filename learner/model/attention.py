"""Attention over a packed stream, in which the completions of a prompt share it.

Registered with transformers under the name NAME; the layout of the stream comes from the forward call's `packing=`
(learner/packing.py). On a GPU in 16 bits it is torch's variable-length flash attention, otherwise padded
scaled-dot-product attention. A model that needs more of its attention is refused (learner/model/supported.py).
Suffixes: S stream, N segments, Q queries and K keys of one segment.
"""

import functools
import inspect
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from learner.model.supported import Probe, check_keywords
from learner.packing import Packing

NAME = "epiphany_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packing: Packing | Probe,
    **keywords: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, S, D], key and value [1, kv heads, S, D] -> [1, S, heads, D].

    With a Probe for `packing`, the call is recorded and the result is empty. Raises ModelError for a keyword that would
    change the result and is not computed here.
    """
    if isinstance(packing, Probe):
        packing.record(keywords)
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    check_keywords(keywords, longest=packing.longest)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, scaling=scaling, packing=packing)[None], None
    return _padded(q, k, v, scaling=scaling, packing=packing)[None], None


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float | None, packing: Packing
) -> torch.Tensor:
    """q [S, heads, D], k and v [S, kv heads, D] -> [S, heads, D]."""
    attend, accepted = _varlen_attention()
    index = packing.varlen
    k, v = k.index_select(0, index.keys), v.index_select(0, index.keys)
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    result = attend(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        index.cumulative_q,
        index.cumulative_k,
        index.longest_q,
        index.longest_k,
        scale=scaling,
        **options,
    )
    return result if isinstance(result, torch.Tensor) else result[0]


@functools.cache
def _varlen_attention() -> tuple[Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], frozenset[str]]:
    """torch's variable-length attention and the names of its parameters, which differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    attend = cast("Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]", varlen_attn)
    return attend, frozenset(inspect.signature(varlen_attn).parameters)


def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scaling: float | None, packing: Packing
) -> torch.Tensor:
    """q [S, heads, D], k and v [S, kv heads, D] -> [S, heads, D]."""
    batches, outputs_S = packing.padded
    outputs = []
    for queries, keys, mask in batches:
        # index_select, not indexing: many completions share a prompt's keys, and only index_select adds their
        # gradients in a fixed order on several CPU threads.
        q_NQ, k_NK, v_NK = (
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x, index in ((q, queries), (k, keys), (v, keys))
        )
        output = F.scaled_dot_product_attention(
            q_NQ, k_NK, v_NK, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, outputs_S)


AttentionInterface.register(NAME, packed_attention)
