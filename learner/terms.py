"""What passes between the learner and an objective.

Suffixes: N completions of the batch, A their tokens one after the other, T completion tokens of a micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from learner.segments import segment_sums


@dataclass(frozen=True)
class Scored:
    """A batch as it was scored: rewards (float64, NaN for none), their terms (NaN where one does not apply), whose group, how
    long, and whether cut off at the limit of `max_tokens`."""

    rewards_N: torch.Tensor
    groups_N: torch.Tensor
    lengths_N: torch.Tensor
    truncated_N: torch.Tensor
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def per_token(self, values_N: torch.Tensor) -> torch.Tensor:
        """A value of each completion for each of its tokens: [A]."""
        return values_N.repeat_interleave(self.lengths_N)

    def sums(self, values_A: torch.Tensor) -> torch.Tensor:
        """The sum over each completion's tokens: [N]."""
        count = len(self.lengths_N)
        return segment_sums(values_A, self.per_token(torch.arange(count)), count)


@dataclass(frozen=True)
class Survey:
    """What a first pass without gradient found of every token of the batch (float32 [A], on the CPU)."""

    old_logprobs_A: torch.Tensor
    reference_logprobs_A: torch.Tensor | None = None
    values_A: torch.Tensor | None = None


@dataclass(frozen=True)
class Prepared:
    """What is trained: `units`, the completions (those together that must meet in one micro-batch); `used_N`, the
    completions that weights count, trained or not; of each token its advantage and, with a critic, its return. `pairs` and
    `ties` are counted where there are pairs."""

    units: Sequence[tuple[int, ...]]
    used_N: torch.Tensor
    advantages_A: torch.Tensor
    returns_A: torch.Tensor | None = None
    pairs: int | None = None
    ties: int | None = None


@dataclass(frozen=True)
class TokenTerms:
    """What the loss needs of each completion token of a micro-batch (all [T]). `rows_T` numbers the completion in the batch.
    `old_logprobs_T` None: the policy has not moved since it was sampled from."""

    rows_T: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    behavior_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None

    def old(self, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        """The policy's log-probabilities at the start of the step; `policy_logprobs_T` are those of now."""
        return policy_logprobs_T.detach() if self.old_logprobs_T is None else self.old_logprobs_T
