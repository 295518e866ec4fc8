"""Surrogate objectives, importance weights and the value loss, per token. Pure functions of tensors.

Log-probabilities are in nats. `rows_T` gives the completion of each token; all tokens of a completion must be present.
Ratios are clamped to [exp(-20), exp(20)], so that nothing overflows. Suffix T: completion tokens.
"""

import torch

from learner.losses.segments import segment_sums


def token_clip(
    policy_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """PPO's clipped surrogate (arXiv:1707.06347), negated so that it is minimized: [T].

    -min(w A, clip(w, 1 - low, 1 + high) A), w = exp(policy - old). With `dual_clip`, w in the first term is at most
    `dual_clip`, which bounds the loss of a negative advantage (dual-clip PPO, arXiv:1912.09729; INTELLECT-2,
    arXiv:2505.07291).
    """
    ratio_T = ratio(policy_logprobs_T - old_logprobs_T)
    clipped_T = ratio_T.clamp(1 - low, 1 + high)
    bounded_T = ratio_T if dual_clip is None else ratio_T.clamp(max=dual_clip)
    return -torch.minimum(bounded_T * advantages_T, clipped_T * advantages_T)


def sequence_clip(
    policy_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    rows_T: torch.Tensor,
    *,
    low: float,
    high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """GSPO (arXiv:2507.18071, equations 5 to 7): token_clip with one ratio per completion, exp(mean(policy - old)).

    Each token carries its completion's value ([T]), so that weights of 1 / length add up to it.
    """
    mean_T = mean_of_rows(policy_logprobs_T - old_logprobs_T, rows_T)
    return token_clip(mean_T, torch.zeros_like(mean_T), advantages_T, low=low, high=high, dual_clip=dual_clip)


def clipped_weight(
    policy_logprobs_T: torch.Tensor,
    old_logprobs_T: torch.Tensor,
    advantages_T: torch.Tensor,
    *,
    low: float,
    high: float,
) -> torch.Tensor:
    """CISPO (MiniMax-M1, arXiv:2506.13585, equations 4 and 5): -stop(clip(w, 1 - low, 1 + high)) A policy, [T].

    The clipped weight has no gradient, so that a token keeps its gradient where PPO's clip would remove it.
    """
    weight_T = ratio(policy_logprobs_T - old_logprobs_T).clamp(1 - low, 1 + high).detach()
    return -weight_T * advantages_T * policy_logprobs_T


def reinforce(policy_logprobs_T: torch.Tensor, advantages_T: torch.Tensor) -> torch.Tensor:
    """REINFORCE (Williams 1992): -A policy, [T]."""
    return -advantages_T * policy_logprobs_T


def importance_weights(
    old_logprobs_T: torch.Tensor,
    behavior_logprobs_T: torch.Tensor,
    rows_T: torch.Tensor,
    *,
    cap: float,
    level: str = "token",
    mode: str = "truncate",
) -> torch.Tensor:
    """Importance weight old / behavior, without gradient: [T].

    With level "sequence" it is the product over the completion's tokens. A weight over `cap` becomes the cap (mode
    "truncate") or 0 (mode "mask").

    It corrects for an engine whose distribution differs slightly from the learner's (numerics, an older adapter): Yao
    et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training". The truncation is IMPALA's
    (arXiv:1802.01561); the mask is TRL's.
    """
    difference_T = (old_logprobs_T - behavior_logprobs_T).detach()
    weight_T = ratio(segment_sums(difference_T, rows_T)[rows_T] if level == "sequence" else difference_T)
    return weight_T.clamp(max=cap) if mode == "truncate" else torch.where(weight_T > cap, 0.0, weight_T)


def is_clipped(ratio_T: torch.Tensor, advantages_T: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """Whether the clip removes a token's gradient: bool [T]."""
    return ((ratio_T < 1 - low) & (advantages_T < 0)) | ((ratio_T > 1 + high) & (advantages_T > 0))


def value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, *, clip: float | None
) -> torch.Tensor:
    """PPO's clipped value loss as in its reference code (arXiv:2005.12729): [T].

    max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2) / 2; with `clip` None, (V - R)^2 / 2.
    """
    errors_T = (values_T - returns_T).square()
    if clip is not None:
        clipped_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
        errors_T = torch.maximum(errors_T, (clipped_T - returns_T).square())
    return errors_T / 2


def ratio(difference_T: torch.Tensor) -> torch.Tensor:
    """exp of a difference of log-probabilities, clamped as above."""
    return difference_T.clamp(-20, 20).exp()


def mean_of_rows(values_T: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    """For each token, the mean of `values_T` over its completion: [T]."""
    return (segment_sums(values_T, rows_T) / segment_sums(torch.ones_like(values_T), rows_T))[rows_T]
