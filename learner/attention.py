"""Attention over a packed stream, in which the completions of one prompt share it.

The stream holds, for each prompt, the prompt once and then its completions; a completion attends to its prompt and to
itself. Registered with transformers under the name NAME, it takes the layout from the forward call's `packing=`.
On a GPU it is torch's variable-length flash attention; elsewhere, and in float32, padded scaled-dot-product attention.
What a model asks of its attention beyond that is refused (`check_attention`), unless it has no effect. Suffixes: S stream,
N segments, Q queries, K keys of one segment.
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from actors.models import ModelError

NAME = "epiphany_packed"
# Keywords that say nothing about which keys a query sees or how they are weighed.
HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Segment:
    """`length` tokens at `start` of the stream that follow the `prefix_length` tokens at `prefix_start`."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass
class Probe:
    """Takes a Packing's place to see what a model asks of its attention, for sequences of up to `longest` tokens."""

    longest: int
    calls: int = 0
    asked: dict[str, Any] = field(default_factory=dict)


class Packing:
    """How a stream of segments attends. Segments lie end to end; index tensors are made once a forward pass."""

    def __init__(self, segments: Sequence[Segment], device: torch.device | str) -> None:
        self.segments = list(segments)
        self.device = torch.device(device)
        self.longest = max(s.prefix_length + s.length for s in self.segments)

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
    scaling: float | None = None, dropout: float = 0.0, *, packing: Packing | Probe, **keywords: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: query [1, heads, S, D], key and value [1, kv heads, S, D] -> [1, S, heads, D].

    Raises ModelError for a keyword with an effect that is not computed here.
    """
    unknown = _with_effect(keywords, packing.longest)
    if isinstance(packing, Probe):
        packing.calls += 1
        packing.asked |= unknown
        return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    if unknown:
        raise ModelError(f"the learner's attention does not compute {_listed(unknown)}")
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


def check_attention(model: PreTrainedModel, *, longest: int) -> None:
    """Raises ModelError if packed attention is not all that mixes the tokens of `model` (which may be on the meta device), in
    sequences of up to `longest` tokens: the learner would train on other numbers than the engine's."""
    name, config = type(model).__name__, model.config.get_text_config()
    other_layers = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other_layers:
        raise ModelError(f"{name} has layers of {', '.join(sorted(other_layers))}, which the learner does not compute")
    probe = Probe(longest)
    two = torch.arange(2, device=model.device)[None]
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=two, position_ids=two, use_cache=False, packing=probe)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ModelError(f"it cannot be seen what attention {name} needs ({error})") from error
    if probe.calls != config.num_hidden_layers:
        raise ModelError(
            f"{name} calls attention {probe.calls} times for {config.num_hidden_layers} layers: not all of its layers are "
            "attention layers that the learner computes"
        )
    if probe.asked:
        raise ModelError(
            f"{name} uses {_listed(probe.asked)} with sequences of up to {longest} tokens, which the learner's attention does "
            "not compute; choose another model"
            + (", or a shorter sampling.max_tokens" if "sliding_window" in probe.asked else "")
        )


def _with_effect(keywords: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Those of the keywords of an attention call that change its result for sequences of up to `longest` tokens."""

    def has_effect(name: str, value: Any) -> bool:
        if value is None or name in HARMLESS or (name == "is_causal" and value is True):
            return False
        return not (name == "sliding_window" and value >= longest)

    return {name: value for name, value in keywords.items() if has_effect(name, value)}


def _listed(keywords: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value}" if isinstance(value, (int, float, str)) else name for name, value in sorted(keywords.items())
    )


AttentionInterface.register(NAME, packed_attention)
