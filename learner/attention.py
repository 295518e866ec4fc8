"""Attention over a packed stream, in which the completions of one prompt share it.

The stream holds, for each prompt, the prompt once and then its completions; a completion attends to its prompt and to
itself. Registered with transformers under the name NAME, it takes the layout from the forward call's `packing=`.
On a GPU it is torch's variable-length flash attention; elsewhere, and in float32, padded scaled-dot-product attention.
Suffixes: S stream, N segments, Q queries, K keys of one segment.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "epiphany_packed"


@dataclass(frozen=True)
class Segment:
    """`length` tokens at `start` of the stream that follow the `prefix_length` tokens at `prefix_start`."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class Packing:
    """How a stream of segments attends. Segments lie end to end; index tensors are made once a forward pass."""

    def __init__(self, segments: Sequence[Segment], device: torch.device | str) -> None:
        self.segments = list(segments)
        self.device = torch.device(device)

    @functools.cached_property
    def varlen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Index of the keys [K total], cumulative query and key lengths [N + 1], and the longest of both."""
        keys, lengths_q, lengths_k = [], [0], [0]
        for s in self.segments:
            keys.append(torch.arange(s.prefix_start, s.prefix_start + s.prefix_length))
            keys.append(torch.arange(s.start, s.start + s.length))
            lengths_q.append(s.length)
            lengths_k.append(s.prefix_length + s.length)
        cumulative = [torch.tensor(x).cumsum(0).to(self.device, torch.int32) for x in (lengths_q, lengths_k)]
        return torch.cat(keys).to(self.device), cumulative[0], cumulative[1], max(lengths_q), max(lengths_k)

    @functools.cached_property
    def padded(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], torch.Tensor]:
        """For prompts and for completions: query index [N, Q], key index [N, K], mask [N, 1, Q, K]; and, for each
        stream position, where its output lies in the flattened outputs [S]."""
        batches, positions, offset = [], torch.empty(sum(s.length for s in self.segments), dtype=torch.long), 0
        for kind in ([s for s in self.segments if not s.prefix_length], [s for s in self.segments if s.prefix_length]):
            if not kind:
                continue
            width_q, width_k = max(s.length for s in kind), max(s.prefix_length + s.length for s in kind)
            queries, keys = (
                torch.zeros(len(kind), width_q, dtype=torch.long),
                torch.zeros(len(kind), width_k, dtype=torch.long),
            )
            mask = torch.zeros(len(kind), 1, width_q, width_k, dtype=torch.bool)
            mask[:, :, :, 0] = True  # padding must attend to something
            for n, s in enumerate(kind):
                own = torch.arange(s.start, s.start + s.length)
                queries[n, : s.length] = own
                keys[n, : s.prefix_length] = torch.arange(s.prefix_start, s.prefix_start + s.prefix_length)
                keys[n, s.prefix_length : s.prefix_length + s.length] = own
                mask[n, 0, : s.length, : s.prefix_length] = True
                mask[n, 0, : s.length, s.prefix_length : s.prefix_length + s.length] = (
                    torch.ones(s.length, s.length).tril() > 0
                )
                positions[own] = offset + n * width_q + torch.arange(s.length)
            batches.append((queries.to(self.device), keys.to(self.device), mask.to(self.device)))
            offset += len(kind) * width_q
        return batches, positions.to(self.device)


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, *, packing: Packing, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [1, heads, S, D], key and value [1, kv heads, S, D] -> [1, S, heads, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, scaling, packing)[None], None
    return _padded(q, k, v, scaling, packing)[None], None


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, packing: Packing) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, cumulative_q, cumulative_k, longest_q, longest_k = packing.varlen
    k, v = k.index_select(0, keys), v.index_select(0, keys)
    accepted = _varlen_parameters()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    result = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cumulative_q,
        cumulative_k,
        longest_q,
        longest_k,
        scale=scaling,
        **options,
    )
    return result if isinstance(result, torch.Tensor) else result[0]


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, packing: Packing) -> torch.Tensor:
    batches, positions = packing.padded
    outputs = []
    for queries, keys, mask in batches:
        # index_select, not indexing: many completions share a prompt's keys, and only index_select adds their
        # gradients in a fixed order on several CPU threads.
        q_NQ, k_NK, v_NK = (
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x, index in ((q, queries), (k, keys), (v, keys))
        )
        out = F.scaled_dot_product_attention(
            q_NQ, k_NK, v_NK, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, positions)


AttentionInterface.register(NAME, packed_attention)
