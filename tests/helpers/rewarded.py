"""Scored batches made by hand, without tokens."""

import torch

from learner.batch import RewardedBatch


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rewarded_batch(rewards_N: torch.Tensor, groups_N: torch.Tensor, lengths_N: torch.Tensor) -> RewardedBatch:
    """A batch of which nothing was cut off."""
    return RewardedBatch(rewards_N, groups_N, lengths_N, torch.zeros(len(rewards_N), dtype=torch.bool))
