"""Sums over segments of a tensor: groups of completions, completions of tokens, pairs. A pure function."""

import torch


def segment_sums(values: torch.Tensor, segments: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Of each of `count` segments (null: as many as are named) the sum of its values, where `segments` numbers whose each is."""
    size = int(segments.max()) + 1 if count is None else count
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, segments, values)
