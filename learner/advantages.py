"""Advantages: how much better a completion is than its group. Pure functions of tensors.

Suffixes: N completions in the batch. NaN marks a completion without a reward; its advantage is 0.
"""

import torch


def group_normalised(rewards_N: torch.Tensor, groups_N: torch.Tensor, *, epsilon: float = 1e-4) -> torch.Tensor:
    """GRPO (DeepSeekMath, arXiv:2402.03300): A = (r - mean(r)) / (std(r) + epsilon), over the group's scored completions.

    `groups_N` numbers the groups from 0. std is the sample's (divided by the count less one) and epsilon is added, as
    TRL and verl do (the paper says neither), so [1, 0, 0, 1] gives +-0.866. A flat group gives exactly 0.
    """
    scored_N = rewards_N.isfinite()
    values_N = torch.where(scored_N, rewards_N, torch.zeros_like(rewards_N))
    count_G = _sum(scored_N.to(rewards_N), groups_N).clamp_min(1)
    mean_N = (_sum(values_N, groups_N) / count_G)[groups_N]
    centred_N = torch.where(scored_N, rewards_N - mean_N, torch.zeros_like(rewards_N))
    # A flat group's mean may differ from its rewards in the last bit: such a rest is rounding, not signal.
    flat_N = centred_N.abs() <= 8 * torch.finfo(rewards_N.dtype).eps * mean_N.abs()
    centred_N = torch.where(flat_N, torch.zeros_like(centred_N), centred_N)
    std_N = (_sum(centred_N.square(), groups_N) / (count_G - 1).clamp_min(1)).sqrt()[groups_N]
    return centred_N / (std_N + epsilon)


def _sum(values_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """Sum over each group: [G]."""
    size = int(groups_N.max()) + 1
    return torch.zeros(size, dtype=values_N.dtype, device=values_N.device).index_add(0, groups_N, values_N)
