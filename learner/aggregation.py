"""From per-token losses to one number: the weight of each token, fixed over the full batch. Pure functions.

The weights are made once from the lengths of all completions of the step, so micro-batches and ranks simply add.
"""

import torch


def per_sequence(lengths_N: torch.Tensor, used_N: torch.Tensor) -> torch.Tensor:
    """GRPO's weights: each used completion counts the same, each of its tokens 1 / (completions * length). [N]."""
    used = used_N.to(torch.float32)
    return used / (used.sum().clamp_min(1) * lengths_N.clamp_min(1))
