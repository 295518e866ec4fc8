"""Sums over segments: completions of a group, tokens of a completion, members of a pair. Pure functions of tensors."""

import torch


def segment_sums(values: torch.Tensor, segments: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Sum of `values` per segment id: [count].

    `segments` gives the segment id of each value, counted from 0. `count` defaults to the largest id plus one.
    """
    size = int(segments.max()) + 1 if count is None else count
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, segments, values)
