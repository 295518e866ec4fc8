"""KL(policy || reference) from sampled tokens: estimators, and a coefficient that tracks a target. Pure functions.

The estimators are those of joschu.net/blog/kl-approx.html, with r = reference / policy. They return one value per token
in nats; their mean over tokens that the policy sampled estimates the KL divergence. Suffix T: completion tokens.
"""

import torch


def k1(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """-log r: unbiased, of either sign. Use it in the reward: as a loss, its gradient is 0 in expectation."""
    return policy_logprobs_T - reference_logprobs_T


def k2(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """(log r)^2 / 2: biased, but as a loss its expected gradient is that of the true KL."""
    return (policy_logprobs_T - reference_logprobs_T).square() / 2


def k3(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r: unbiased and never negative. log r is clamped to at most 20, so that r does not overflow."""
    difference_T = (reference_logprobs_T - policy_logprobs_T).clamp(max=20)
    return difference_T.exp() - difference_T - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def adapt_coefficient(coefficient: float, *, measured: float, target: float) -> float:
    """The KL coefficient of the next step, given the `measured` KL and its `target` (both in nats per token).

    coefficient * (1 + 0.1 * e), e = clip(measured / target - 1, -0.2, 0.2): Ziegler et al. (arXiv:1909.08593), section
    2.2.
    """
    return coefficient * (1 + 0.1 * min(0.2, max(-0.2, measured / target - 1)))
