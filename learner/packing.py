"""Packing: which tokens of a packed stream attend to which.

A packed stream holds each prompt once, followed by its completions, without padding; a completion attends to its prompt
and to itself. Knows tensors; knows neither rows nor models. Suffixes: S stream, N segments, Q queries and K keys of one
segment.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Segment:
    """`length` tokens at `start` of the stream that follow the `prefix_length` tokens at `prefix_start`."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class VarlenIndex(NamedTuple):
    """Arguments of variable-length attention; each segment's queries are its own tokens.

    `keys` is the stream position of each key, segment after segment (int64); `cumulative_q` and `cumulative_k` are the
    cumulative numbers of queries and keys (int32 [N + 1]); `longest_q` and `longest_k` are the most of one segment.
    """

    keys: torch.Tensor
    cumulative_q: torch.Tensor
    cumulative_k: torch.Tensor
    longest_q: int
    longest_k: int


class PaddedBatch(NamedTuple):
    """Stream positions of queries [N, Q] and keys [N, K] (int64), and which keys a query sees (bool [N, 1, Q, K]).

    Key k of a segment is token k of its sequence; `places` [N, Q] is the token that each query is (0 for padding).
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor

    def within(self, window: int | None) -> torch.Tensor:
        """`mask` where a query sees itself and the `window - 1` tokens before it at most (None: all)."""
        if window is None or window >= self.keys.shape[1]:
            return self.mask
        oldest = self.places[:, None, :, None] - window
        return self.mask & (torch.arange(self.keys.shape[1], device=self.keys.device) > oldest)


class StreamLayout(NamedTuple):
    """For each stream position (int64 [S]): where its segment and its prefix start in the stream, the length of the
    prefix, and the place of the token in its sequence."""

    starts: torch.Tensor
    prefix_starts: torch.Tensor
    prefix_lengths: torch.Tensor
    places: torch.Tensor


class Packing:
    """The segments of one stream, end to end. Index tensors are on `device` and computed once per stream.

    `longest` is the length in tokens of the longest sequence, prefix included. `block_masks` are those of flex
    attention by window, made at first use.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device | str) -> None:
        self.segments = list(segments)
        self.device = torch.device(device)
        self.longest = max(segment.prefix_length + segment.length for segment in self.segments)
        self.block_masks: dict[int | None, object] = {}
        self._before: dict[int, torch.Tensor] = {}

    @functools.cached_property
    def layout(self) -> StreamLayout:
        columns: list[list[torch.Tensor]] = [[], [], [], []]
        for segment in self.segments:
            starts_and_length = (segment.start, segment.prefix_start, segment.prefix_length)
            for column, value in zip(columns[:3], starts_and_length, strict=True):
                column.append(torch.full((segment.length,), value))
            columns[3].append(torch.arange(segment.prefix_length, segment.prefix_length + segment.length))
        return StreamLayout(*(torch.cat(column).to(self.device) for column in columns))

    def before(self, count: int) -> torch.Tensor:
        """The stream position of the token `count` places before each one in its sequence; S where there is none."""
        if count not in self._before:
            starts, prefix_starts, _, places = self.layout
            own = torch.arange(len(starts), device=self.device) - count
            there = torch.where(own >= starts, own, prefix_starts + places - count)
            self._before[count] = torch.where(places >= count, there, len(starts))
        return self._before[count]

    @functools.cached_property
    def varlen(self) -> VarlenIndex:
        keys, lengths_q, lengths_k = [], [0], [0]
        for segment in self.segments:
            keys.append(torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length))
            keys.append(torch.arange(segment.start, segment.start + segment.length))
            lengths_q.append(segment.length)
            lengths_k.append(segment.prefix_length + segment.length)
        cumulative_q, cumulative_k = (
            torch.tensor(lengths).cumsum(0).to(self.device, torch.int32) for lengths in (lengths_q, lengths_k)
        )
        return VarlenIndex(torch.cat(keys).to(self.device), cumulative_q, cumulative_k, max(lengths_q), max(lengths_k))

    @functools.cached_property
    def padded(self) -> tuple[list[PaddedBatch], torch.Tensor]:
        """One batch of the prompts and one of the completions, and where in their flattened outputs each stream
        position lies: int64 [S]."""
        prompts = [segment for segment in self.segments if not segment.prefix_length]
        completions = [segment for segment in self.segments if segment.prefix_length]
        batches, offset = [], 0
        outputs_S = torch.empty(sum(segment.length for segment in self.segments), dtype=torch.long)
        for segments in (prompts, completions):
            if not segments:
                continue
            batch = _padded_batch(segments)
            width_q = batch.queries.shape[1]
            for n, segment in enumerate(segments):
                outputs_S[segment.start : segment.start + segment.length] = (
                    offset + n * width_q + torch.arange(segment.length)
                )
            batches.append(PaddedBatch(*(x.to(self.device) for x in batch)))
            offset += len(segments) * width_q
        return batches, outputs_S.to(self.device)


def _padded_batch(segments: Sequence[Segment]) -> PaddedBatch:
    width_q = max(segment.length for segment in segments)
    width_k = max(segment.prefix_length + segment.length for segment in segments)
    queries = torch.zeros(len(segments), width_q, dtype=torch.long)
    keys = torch.zeros(len(segments), width_k, dtype=torch.long)
    places = torch.zeros_like(queries)
    mask = torch.zeros(len(segments), 1, width_q, width_k, dtype=torch.bool)
    mask[:, :, :, 0] = True  # padding must attend to something
    for n, segment in enumerate(segments):
        prefix, length = segment.prefix_length, segment.length
        own = torch.arange(segment.start, segment.start + length)
        queries[n, :length] = own
        places[n, :length] = torch.arange(prefix, prefix + length)
        keys[n, :prefix] = torch.arange(segment.prefix_start, segment.prefix_start + prefix)
        keys[n, prefix : prefix + length] = own
        mask[n, 0, :length, :prefix] = True
        mask[n, 0, :length, prefix : prefix + length] = torch.ones(length, length).tril() > 0
    return PaddedBatch(queries, keys, mask, places)
