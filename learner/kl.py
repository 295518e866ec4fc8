"""KL(policy || reference) from sampled tokens: estimators, and a coefficient that follows a target. Pure functions.

With r = reference / policy, all from joschu.net/blog/kl-approx.html; d is the log-ratio policy - reference (suffix T).
"""

import torch


def k1(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """-log r = d: unbiased, of either sign. As a loss it has no gradient in expectation: it belongs in the reward."""
    return policy_logprobs_T - reference_logprobs_T


def k2(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """(log r)^2 / 2: biased, and as a loss on samples of the policy its gradient is that of the true KL."""
    return (policy_logprobs_T - reference_logprobs_T).square() / 2


def k3(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r: unbiased and never negative. log r is at most 20, so that r does not overflow."""
    difference_T = (reference_logprobs_T - policy_logprobs_T).clamp(max=20)
    return difference_T.exp() - difference_T - 1


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def adapted(coefficient: float, *, measured: float, target: float) -> float:
    """Ziegler et al. (arXiv:1909.08593, section 2.2): coefficient * (1 + 0.1 * e), e = clip(measured / target - 1, -0.2, 0.2)."""
    return coefficient * (1 + 0.1 * min(0.2, max(-0.2, measured / target - 1)))
