"""The Algorithm protocol, and what passes between it and the learner.

`prepare` sees the whole batch once, without gradient; `loss` sees micro-batches and only sums, so that micro-batches
and ranks add up. Knows tensors; knows neither Arrow, models nor optimizers. Suffixes: N trajectories of the batch, A
their sampled tokens one after the other, T sampled tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from conf.schema import AlgorithmSettings
from learner.batch import RewardedBatch
from learner.minibatches import Unit


@dataclass(frozen=True)
class OldLogprobs:
    """What a pass without gradient computed for every sampled token of the batch (float32 [A], on the CPU)."""

    old_logprobs_A: torch.Tensor
    reference_logprobs_A: torch.Tensor | None = None
    values_A: torch.Tensor | None = None


@dataclass(frozen=True)
class Advantages:
    """What is trained: the `pack_units` that have a gradient.

    `counted_N` are the trajectories that weights count, whether they have a gradient or not; each token has its
    advantage and, with a critic, its return. `pairs` and `ties` are counted where there are pairs.
    """

    pack_units: Sequence[Unit]
    counted_N: torch.Tensor
    advantages_A: torch.Tensor
    returns_A: torch.Tensor | None = None
    pairs: int | None = None
    ties: int | None = None


@dataclass(frozen=True)
class LossInputs:
    """What the loss needs of each sampled token of a micro-batch (all [T]).

    `rows_T` numbers the trajectory in the batch. `old_logprobs_T` are the policy's at the start of the step, and
    `reference_logprobs_T` the base model's, if the algorithm needs them.
    """

    rows_T: torch.Tensor
    advantages_T: torch.Tensor
    weights_T: torch.Tensor
    behavior_logprobs_T: torch.Tensor
    policy_logprobs_T: torch.Tensor
    old_logprobs_T: torch.Tensor
    reference_logprobs_T: torch.Tensor | None = None


class Algorithm(Protocol):
    """An algorithm as the learner sees it. `kl_coefficient` is the weight of KL, which the learner may adapt."""

    settings: AlgorithmSettings
    kl_coefficient: float

    @property
    def reference_in_loss(self) -> bool:
        """Whether the loss needs log-probabilities of the base model."""
        ...

    @property
    def reference_in_reward(self) -> bool:
        """Whether the advantages need them."""
        ...

    @property
    def has_critic(self) -> bool:
        """Whether the advantages need a value for each token."""
        ...

    def prepare(self, batch: RewardedBatch, old: OldLogprobs | None) -> Advantages:
        """Advantages of the whole batch; `old` is there if any of the above is, or with several optimizer steps."""
        ...

    def weights(self, batch: RewardedBatch, counted_N: torch.Tensor) -> torch.Tensor:
        """The weight of one token of each trajectory ([N]); `counted_N` are those of this optimizer step."""
        ...

    def loss(self, inputs: LossInputs) -> torch.Tensor:
        """The sum over the micro-batch's tokens, a scalar with a gradient to `policy_logprobs_T`."""
        ...

    def clipped(self, inputs: LossInputs) -> torch.Tensor:
        """The tokens whose gradient the clip cuts off (bool [T])."""
        ...

    def over_cap(self, inputs: LossInputs) -> torch.Tensor:
        """The tokens whose importance weight is over its cap (bool [T])."""
        ...
