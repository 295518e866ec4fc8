"""Attention over a packed stream, in which the completions of a prompt share it.

Registered with transformers under the name NAME; the layout of the stream comes from the forward call's `packing=`
(learner/packing.py). On a GPU in 16 bits it is torch's variable-length flash attention, or flex attention
(flex_attention.py) for what that does not compute; elsewhere padded attention in plain torch. A model that needs more
of its attention is refused (learner/model/supported.py).
Suffixes: S stream, N segments, Q queries and K keys of one segment.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from actors.models.source import ModelError
from learner.model.probe import Probe, check_keywords
from learner.packing import Packing

NAME = "epiphany_packed"
# The widest heads that flash attention computes.
VARLEN_HEAD_SIZE = 256


@dataclass(frozen=True)
class Scores:
    """How a query weights its keys: softmax over softcap * tanh(scale * q.k / softcap).

    A query sees itself and the `window - 1` tokens before it (None: all). `sinks` [heads] are scores of one more key
    without a value, so that weights need not add up to 1 (gpt-oss).
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether the weights are an ordinary softmax over q.k."""
        return self.softcap is None and self.sinks is None


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **keywords: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, S, D], key and value [1, kv heads, S, D] -> [1, S, heads, D].

    Nothing is dropped out. With a Probe for `packing`, the call is recorded and the result is empty. Raises ModelError
    for a keyword that would change the result and is not computed here.
    """
    if keywords.get("is_causal") is None:
        keywords["is_causal"] = getattr(module, "is_causal", True)
    if isinstance(packing, Probe):
        packing.record(keywords)
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    check_keywords(keywords)
    window = None if sliding_window is None or sliding_window >= packing.longest else sliding_window
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, s_aux)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if not (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)):
        return _padded(q, k, v, scores=scores, packing=packing)[None], None
    if scores.is_plain and query.shape[-1] <= VARLEN_HEAD_SIZE:
        return _varlen(q, k, v, scores=scores, packing=packing)[None], None
    from learner.model.flex_attention import flex

    return flex(query, key, value, scores=scores, packing=packing), None


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scores: Scores, packing: Packing) -> torch.Tensor:
    """q [S, heads, D], k and v [S, kv heads, D] -> [S, heads, D]."""
    attend, accepted = _varlen_attention()
    index = packing.varlen
    k, v = k.index_select(0, index.keys), v.index_select(0, index.keys)
    left = -1 if scores.window is None else scores.window - 1
    options: dict[str, object] = {"window_size": (left, 0)} if "window_size" in accepted else {"is_causal": True}
    if scores.window is not None and "window_size" not in accepted:
        raise ModelError("this torch's variable-length attention computes no sliding window; install a newer one")
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
        scale=scores.scale,
        **options,
    )
    return result if isinstance(result, torch.Tensor) else result[0]


@functools.cache
def _varlen_attention() -> tuple[Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], frozenset[str]]:
    """torch's variable-length attention and the names of its parameters, which differ between versions of torch."""
    from torch.nn.attention.varlen import varlen_attn

    attend = cast("Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]", varlen_attn)
    return attend, frozenset(inspect.signature(varlen_attn).parameters)


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scores: Scores, packing: Packing) -> torch.Tensor:
    """q [S, heads, D], k and v [S, kv heads, D] -> [S, heads, D]."""
    batches, outputs_S = packing.padded
    outputs = []
    for batch in batches:
        # index_select, not indexing: many completions share a prompt's keys, and only index_select adds their
        # gradients in a fixed order on several CPU threads.
        q_NQ, k_NK, v_NK = (
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x, index in ((q, batch.queries), (k, batch.keys), (v, batch.keys))
        )
        mask = batch.within(scores.window)
        if scores.is_plain:
            output = F.scaled_dot_product_attention(
                q_NQ, k_NK, v_NK, attn_mask=mask, scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            output = _weighted(q_NQ, k_NK, v_NK, mask=mask, scores=scores)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, outputs_S)


def _weighted(
    q_NQ: torch.Tensor, k_NK: torch.Tensor, v_NK: torch.Tensor, *, mask: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Attention with soft caps and sinks: [N, heads, Q, D] and [N, kv heads, K, D] -> [N, heads, Q, D]."""
    heads, queries = q_NQ.shape[1:3]
    k_NK, v_NK = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_NK, v_NK))
    weights = (q_NQ @ k_NK.transpose(2, 3)).float() * scores.scale
    if scores.softcap is not None:
        weights = scores.softcap * torch.tanh(weights / scores.softcap)
    weights = weights.masked_fill(~mask, float("-inf"))
    if scores.sinks is not None:
        sinks = scores.sinks.float()[None, :, None, None].expand(len(q_NQ), -1, queries, -1)
        weights = torch.cat([weights, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = weights.softmax(-1)
    return weights.to(v_NK.dtype) @ v_NK


AttentionInterface.register(NAME, packed_attention)
