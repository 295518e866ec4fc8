"""Estimators of KL(policy || reference) from sampled tokens. Pure functions of tensors (suffix T)."""

import torch


def k3(policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 (joschu.net/blog/kl-approx.html): exp(d) - d - 1 with d = reference - policy; never negative."""
    difference_T = reference_logprobs_T - policy_logprobs_T
    return difference_T.exp() - difference_T - 1
