"""An algorithm of one's own: REINFORCE with the median of a group as its baseline.

    python launch.py run.name=median algorithm.name=examples/my_algorithm.py:RECIPE

A Recipe holds the functions in which policy gradients differ: the advantage of each token, the loss of each token, and
how the losses are added up. The learner does the rest: importance weights, KL, packing, several ranks. The median of a
group does not move with one lucky completion, as the mean does. Suffixes: N trajectories of the batch, A their sampled
tokens one after the other, T sampled tokens of a micro-batch.
"""

import torch

from conf.schema import AlgorithmSettings
from learner.algorithms.base import LossInputs
from learner.algorithms.recipe import AdvantageInputs, Recipe
from learner.losses.aggregation import token_mean


def over_median(inputs: AdvantageInputs) -> tuple[torch.Tensor, None]:
    """A = r - median of the group's rewards, [A]; 0 for a trajectory without a reward (NaN). There are no returns."""
    rewards_N, groups_N = inputs.rewards_N, inputs.batch.groups_N
    advantages_N = torch.zeros_like(rewards_N)
    for group in groups_N.unique():
        members_N = groups_N == group
        advantages_N[members_N] = rewards_N[members_N] - rewards_N[members_N].nanquantile(0.5)
    return inputs.batch.per_token(advantages_N.nan_to_num(0.0)), None


def log_likelihood(inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    """-A log pi, the loss of each token: [T]. A Recipe's function also gets the settings below `algorithm`."""
    return -inputs.advantages_T * inputs.policy_logprobs_T


# The loss is the mean over all tokens of the batch, and nothing is clipped, so there is no ratio to report.
RECIPE = Recipe(over_median, log_likelihood, aggregation=token_mean, ratio=None)
