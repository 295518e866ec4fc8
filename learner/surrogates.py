"""Surrogate objectives and importance weights, per token. Pure functions of tensors (suffix T: completion tokens).

`rows_T` says whose completion a token is; a completion's tokens are all there. Ratios lie within exp(-20) and exp(20), so that
nothing overflows.
"""

import torch

from learner.segments import segment_sums


def token_clip(
    policy_logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, advantages_T: torch.Tensor, *, low: float, high: float,
    most: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """PPO's clipped surrogate (arXiv:1707.06347), negated to be minimised.

    -min(w A, clip(w, 1 - low, 1 + high) A), w = exp(policy - old). Two-sided: w in the first term is at most `most`, which
    bounds what a negative advantage can do (dual-clip PPO, arXiv:1912.09729; INTELLECT-2, arXiv:2505.07291).
    """
    ratio_T = ratio(policy_logprobs_T - old_logprobs_T)
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    bounded_T = ratio_T if most is None else ratio_T.clamp(max=most)
    return -torch.minimum(bounded_T * advantages_T, clipped_T * advantages_T)


def sequence_clip(
    policy_logprobs_T: torch.Tensor, old_logprobs_T: torch.Tensor, advantages_T: torch.Tensor, rows_T: torch.Tensor, *,
    low: float, high: float, most: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """GSPO (arXiv:2507.18071, equations 5 to 7): token_clip with one ratio a completion, the geometric mean of its tokens',
    exp(mean(policy - old)). Every token carries its completion's value, so that weights of 1 / length add up to it."""
    mean_T = mean_of_rows(policy_logprobs_T - old_logprobs_T, rows_T)
    return token_clip(mean_T, torch.zeros_like(mean_T), advantages_T, low=low, high=high, most=most)


def clipped_weight(
    policy_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    low: float,
    high: float,
) -> torch.Tensor:
    """CISPO (MiniMax-M1, arXiv:2506.13585, equations 4 and 5): -stop(clip(w, 1 - low, 1 + high)) A policy, so that a token keeps
    its gradient where PPO's clip would take it."""
    weight_T = ratio(policy_logprobs_T - old_logprobs_T).clamp(1 - low, 1 + high).detach()
    return -weight_T * advantages_T * policy_logprobs_T


def reinforce(policy_logprobs_T: torch.Tensor, advantages_T: torch.Tensor) -> torch.Tensor:
    """REINFORCE (Williams 1992): -A policy."""
    return -advantages_T * policy_logprobs_T


def importance(
    old_logprobs_T: torch.Tensor, behavior_logprobs_T: torch.Tensor, rows_T: torch.Tensor, *, cap: float, level: str = "token",
    mode: str = "truncate",
) -> torch.Tensor:  # fmt: skip
    """Importance weight old / behavior, without gradient, of a token or (level "sequence") of its whole completion, the product
    of its tokens'; where it is over `cap`, it becomes the cap (mode "truncate") or 0 ("mask").

    Corrects for an engine that samples from a slightly other distribution than the learner holds (numerics, an older
    adapter): Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; the truncation
    is IMPALA's (arXiv:1802.01561); the mask is as TRL has it.
    """
    difference_T = (old_logprobs_T - behavior_logprobs_T).detach()
    weight_T = ratio(segment_sums(difference_T, rows_T)[rows_T] if level == "sequence" else difference_T)
    return weight_T.clamp(max=cap) if mode == "truncate" else torch.where(weight_T > cap, 0.0, weight_T)


def is_clipped(ratio_T: torch.Tensor, advantages_T: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """Which tokens the clip cuts off from the gradient (bool [T])."""
    return ((ratio_T < 1 - low) & (advantages_T < 0)) | ((ratio_T > 1 + high) & (advantages_T > 0))


def value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, *, clip: float | None
) -> torch.Tensor:
    """max((V - R)^2, (clip(V, old - c, old + c) - R)^2) / 2, as PPO's reference code has it (arXiv:2005.12729); `clip` None is
    the plain squared error."""
    errors_T = (values_T - returns_T).square()
    if clip is not None:
        near_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
        errors_T = torch.maximum(errors_T, (near_T - returns_T).square())
    return errors_T / 2


def ratio(difference_T: torch.Tensor) -> torch.Tensor:
    """exp of a difference of log-probabilities."""
    return difference_T.clamp(-20, 20).exp()


def mean_of_rows(values_T: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    """For each token, the mean over its completion."""
    return (segment_sums(values_T, rows_T) / segment_sums(torch.ones_like(values_T), rows_T))[rows_T]
