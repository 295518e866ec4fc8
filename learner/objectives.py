"""Objectives: each algorithm as advantages, weights, and a loss that only sums.

An objective's `prepare` sees the whole batch once, without gradient; its `loss` sees micro-batches. To add an
algorithm, write a class and name it in OBJECTIVES. Knows tensors; knows neither Arrow, models nor optimizers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from conf.schema import AlgorithmSettings
from learner import advantages, aggregation, kl, surrogates


@dataclass(frozen=True)
class Prepared:
    """One number a completion: its advantage, and the weight of each of its tokens."""

    advantages_N: torch.Tensor
    token_weights_N: torch.Tensor


@dataclass(frozen=True)
class TokenTerms:
    """What the loss needs of each completion token of a micro-batch (all [T])."""

    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    behavior_logprobs_T: torch.Tensor


class Objective(Protocol):
    """An algorithm."""

    needs_reference: bool

    def __init__(self, settings: AlgorithmSettings) -> None: ...

    def prepare(self, rewards_N: torch.Tensor, groups_N: torch.Tensor, lengths_N: torch.Tensor) -> Prepared: ...

    def loss(
        self, terms: TokenTerms, policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor | None
    ) -> torch.Tensor: ...

    def clipped(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        """Which tokens the objective cuts off (bool [T])."""
        ...


class GRPO:
    """Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300, equation 3).

    J = 1/N sum_i 1/T_i sum_t [min(w A, clip(w) A) - beta k3], w = policy / old, A the reward normalised in its group.
    `old` is the learner's own distribution at the start of the step; with one optimizer step a batch that is the
    policy itself, detached. Deviation: each token is multiplied by the truncated importance weight min(old / behavior,
    cap), because the engine that sampled is not exactly the learner.
    """

    def __init__(self, settings: AlgorithmSettings) -> None:
        self._settings = settings
        self.needs_reference = settings.kl_coefficient != 0

    def prepare(self, rewards_N: torch.Tensor, groups_N: torch.Tensor, lengths_N: torch.Tensor) -> Prepared:
        return Prepared(
            advantages.group_normalised(rewards_N, groups_N),
            aggregation.per_sequence(lengths_N, rewards_N.isfinite()),
        )

    def loss(
        self, terms: TokenTerms, policy_logprobs_T: torch.Tensor, reference_logprobs_T: torch.Tensor | None
    ) -> torch.Tensor:
        s, old_logprobs_T = self._settings, policy_logprobs_T.detach()
        loss_T = surrogates.token_clip(
            policy_logprobs_T, old_logprobs_T, terms.advantages_T, low=s.clip_low, high=s.clip_high
        )
        if s.importance_cap is not None:
            loss_T = loss_T * surrogates.truncated_importance(
                old_logprobs_T, terms.behavior_logprobs_T, cap=s.importance_cap
            )
        if reference_logprobs_T is not None:
            loss_T = loss_T + s.kl_coefficient * kl.k3(policy_logprobs_T, reference_logprobs_T)
        return (loss_T * terms.weights_T).sum()

    def clipped(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        cap = self._settings.importance_cap
        if cap is None:
            return torch.zeros_like(policy_logprobs_T, dtype=torch.bool)
        return (policy_logprobs_T - terms.behavior_logprobs_T).exp() > cap


OBJECTIVES: dict[str, type[Objective]] = {
    "grpo": GRPO,
}
