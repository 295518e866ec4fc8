"""Recipe: a policy gradient as functions, and the advantages and surrogates that recipes are made of.

Knows tensors and the pure functions of learner/losses; knows neither models nor optimizers. Suffixes as in base.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from conf.schema import AlgorithmSettings
from learner.algorithms.base import LossInputs
from learner.batch import RewardedBatch
from learner.losses import advantages, surrogates
from learner.losses.aggregation import Aggregation


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage is made from: a batch without what was taken off its rewards, and what to take off each token.

    `penalty_A` is KL in the reward; `values_A` are the critic's.
    """

    batch: RewardedBatch
    counted_N: torch.Tensor
    settings: AlgorithmSettings
    term_weights: Mapping[str, float]
    penalty_A: torch.Tensor | None = None
    values_A: torch.Tensor | None = None

    @property
    def rewards_N(self) -> torch.Tensor:
        """Rewards, less each trajectory's penalty."""
        penalty_A = self.penalty_A
        return self.batch.rewards_N if penalty_A is None else self.batch.rewards_N - self.batch.sums(penalty_A)

    @property
    def rewards_A(self) -> torch.Tensor:
        """Rewards token by token: the penalty where it arises, the reward at the last token."""
        rewards_A = torch.zeros(int(self.batch.lengths_N.sum()), dtype=torch.float64)
        if self.penalty_A is not None:
            rewards_A -= self.penalty_A
        rewards_A[self.batch.last_token_N] += self.batch.rewards_N.nan_to_num(0.0)
        return rewards_A

    @property
    def counted_A(self) -> torch.Tensor:
        return self.batch.per_token(self.counted_N)


# Advantages and, with a critic, returns, both of each token [A].
AdvantageFn = Callable[[AdvantageInputs], tuple[torch.Tensor, torch.Tensor | None]]
SurrogateFn = Callable[[LossInputs, AlgorithmSettings], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """An algorithm as functions: the advantage, the loss of each token, how these are added up, and its ratio.

    `ratio` gives what the clip is compared with, for the share of clipped tokens; None if nothing is clipped.
    """

    advantage: AdvantageFn
    surrogate: SurrogateFn
    aggregation: Aggregation
    ratio: Callable[[LossInputs], torch.Tensor] | None
    has_critic: bool = False


# Advantages


def group_relative(inputs: AdvantageInputs) -> tuple[torch.Tensor, None]:
    """Rewards against the group's mean, over its deviation unless algorithm.scale_rewards says otherwise."""
    return _in_groups(inputs, scale=inputs.settings.scale_rewards or "group")


def group_centered(inputs: AdvantageInputs) -> tuple[torch.Tensor, None]:
    """Rewards against the group's mean."""
    return _in_groups(inputs, scale=inputs.settings.scale_rewards or "none")


def leave_one_out(inputs: AdvantageInputs) -> tuple[torch.Tensor, None]:
    """Rewards against the mean of the group's others."""
    if inputs.settings.normalize_terms or inputs.settings.scale_rewards is not None:
        return _in_groups(inputs, scale=inputs.settings.scale_rewards or "none")
    return inputs.batch.per_token(advantages.leave_one_out(inputs.rewards_N, inputs.batch.groups_N)), None


def _in_groups(inputs: AdvantageInputs, *, scale: str) -> tuple[torch.Tensor, None]:
    groups_N = inputs.batch.groups_N
    if inputs.settings.normalize_terms:
        advantages_N = advantages.terms_normalized(dict(inputs.batch.terms), dict(inputs.term_weights), groups_N)
    else:
        advantages_N = advantages.group_relative(inputs.rewards_N, groups_N, scale=scale)
    return inputs.batch.per_token(advantages_N), None


def batch_normalized(inputs: AdvantageInputs) -> tuple[torch.Tensor, None]:
    """Rewards to go, normalized over the batch."""
    to_go_A = advantages.reward_to_go(inputs.rewards_A, inputs.batch.lengths_N)
    return advantages.batch_normalized(to_go_A, inputs.counted_A), None


def generalized(inputs: AdvantageInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation against the critic, normalized over the batch; and the returns."""
    assert inputs.values_A is not None
    values_A, ppo = inputs.values_A.double(), inputs.settings.ppo
    advantages_A = advantages.gae(
        inputs.rewards_A, values_A, inputs.batch.lengths_N, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda
    )
    return advantages.batch_normalized(advantages_A, inputs.counted_A), advantages_A + values_A


def likelihood(inputs: AdvantageInputs) -> tuple[torch.Tensor, None]:
    """1 for every token, whatever the rewards: the surrogate is the token's negative log-likelihood then."""
    return torch.ones(int(inputs.batch.lengths_N.sum()), dtype=torch.float64), None


# Surrogates


def token_clip(inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    return surrogates.token_clip(
        inputs.policy_logprobs_T,
        inputs.old_logprobs_T,
        inputs.advantages_T,
        low=settings.clip_low,
        high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )


def sequence_clip(inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    return surrogates.sequence_clip(
        inputs.policy_logprobs_T,
        inputs.old_logprobs_T,
        inputs.advantages_T,
        inputs.rows_T,
        low=settings.clip_low,
        high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )


def clipped_weight(inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    return surrogates.clipped_weight(
        inputs.policy_logprobs_T,
        inputs.old_logprobs_T,
        inputs.advantages_T,
        low=settings.clip_low,
        high=settings.clip_high,
    )


def reinforce(inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    return surrogates.reinforce(inputs.policy_logprobs_T, inputs.advantages_T)


def token_ratio(inputs: LossInputs) -> torch.Tensor:
    """policy / old of each token."""
    return surrogates.ratio(inputs.policy_logprobs_T - inputs.old_logprobs_T)


def sequence_ratio(inputs: LossInputs) -> torch.Tensor:
    """The geometric mean of policy / old over each token's trajectory."""
    difference_T = inputs.policy_logprobs_T - inputs.old_logprobs_T
    return surrogates.ratio(surrogates.mean_of_rows(difference_T, inputs.rows_T))
