"""Surrogate objectives and importance weights, per token. Pure functions of tensors (suffix T: completion tokens)."""

import torch


def token_clip(
    policy_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    low: float,
    high: float,
) -> torch.Tensor:
    """PPO's clipped surrogate (arXiv:1707.06347), negated to be minimised.

    -min(w A, clip(w, 1 - low, 1 + high) A), w = exp(policy - old).
    """
    ratio_T = (policy_logprobs_T - old_logprobs_T).exp()
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def truncated_importance(
    old_logprobs_T: torch.Tensor, behavior_logprobs_T: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """Truncated importance weight min(exp(old - behavior), cap), without gradient.

    Corrects for an engine that samples from a slightly other distribution than the learner holds (numerics, an older
    adapter): Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; the truncation
    is IMPALA's (arXiv:1802.01561).
    """
    return (old_logprobs_T - behavior_logprobs_T).detach().exp().clamp(max=cap)
