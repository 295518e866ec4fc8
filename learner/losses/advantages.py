"""Advantages: how much better a completion, or a token, is than the baseline. Pure functions of tensors.

A reward of NaN marks a completion without a reward; its advantage is 0. `groups_N` numbers the groups from 0.
Suffixes: N completions of the batch, A their tokens one after the other, G groups.
"""

import torch

from learner.losses.segments import segment_sums
from rewards.variance import TOLERANCE

EPSILON = 1e-4  # added to standard deviations, as TRL does


def group_relative(
    rewards_N: torch.Tensor, groups_N: torch.Tensor, *, scale: str = "group", epsilon: float = EPSILON
) -> torch.Tensor:
    """A = (r - mean of the group) / (s + epsilon), over the scored completions: [N].

    `scale` chooses s: "group", the standard deviation in the group (GRPO, DeepSeekMath, arXiv:2402.03300); "batch",
    that of all rewards (arXiv:2508.08221); "none", A = r - mean (Dr. GRPO, arXiv:2503.20783). Standard deviations
    divide by the count minus one, as in TRL and verl (the paper does not say), so that [1, 0, 0, 1] gives +-0.866. A
    group with zero variance gives exactly 0.
    """
    centered_N, count_G = _centered(rewards_N, groups_N)
    if scale == "none":
        return centered_N
    if scale == "batch":
        return centered_N / (_standard_deviation(rewards_N[rewards_N.isfinite()]) + epsilon)
    std_N = (segment_sums(centered_N.square(), groups_N) / (count_G - 1).clamp_min(1)).sqrt()[groups_N]
    return centered_N / (std_N + epsilon)


def leave_one_out(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv:2402.14740): A = r - mean of the other completions in the group, [N].

    Computed as n / (n - 1) * (r - mean), where n counts the scored completions of the group; 0 if n is 1.
    """
    centered_N, count_G = _centered(rewards_N, groups_N)
    count_N = count_G[groups_N]
    return centered_N * count_N / (count_N - 1).clamp_min(1)


def terms_normalized(
    terms: dict[str, torch.Tensor], weights: dict[str, float], groups_N: torch.Tensor, *, epsilon: float = EPSILON
) -> torch.Tensor:
    """GDPO (arXiv:2601.05242): float64 [N].

    Each term of the reward ([N]) is normalized in its group by itself; the sum over terms, weighted by `weights`
    (default 1), is normalized over the batch. A term that is NaN does not apply to that completion.
    """
    total_N = torch.zeros(len(groups_N), dtype=torch.float64)
    scored_N = torch.zeros(len(groups_N), dtype=torch.bool)
    for name, values_N in terms.items():
        total_N += weights.get(name, 1.0) * group_relative(values_N, groups_N, epsilon=epsilon)
        scored_N |= values_N.isfinite()
    values = total_N[scored_N]
    mean = values.mean() if len(values) else 0.0
    # If no group has variance, what is left of the total is rounding.
    has_signal = bool(total_N.any())
    normalized_N = (total_N - mean) / (_standard_deviation(values) + epsilon)
    return torch.where(scored_N & has_signal, normalized_N, torch.zeros_like(total_N))


def batch_normalized(values_A: torch.Tensor, counted_A: torch.Tensor, *, epsilon: float = EPSILON) -> torch.Tensor:
    """REINFORCE++ (arXiv:2501.03262): A = (v - mean) / (std + epsilon) over the tokens `counted_A` (bool): [A].

    Tokens that do not count get 0, and so do all tokens if the values are equal.
    """
    values = values_A[counted_A]
    if len(values) < 2:
        return torch.zeros_like(values_A)
    mean = values.mean()
    has_signal_A = counted_A & ~_is_rounding(values_A - mean, mean)
    centered_A = torch.where(has_signal_A, values_A - mean, torch.zeros_like(values_A))
    return centered_A / (_standard_deviation(values) + epsilon)


def reward_to_go(rewards_A: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
    """For each token, the sum of the rewards from it to the end of its completion: [A]."""
    return gae(rewards_A, torch.zeros_like(rewards_A), lengths_N, gamma=1.0, gae_lambda=1.0)


def gae(
    rewards_A: torch.Tensor, values_A: torch.Tensor, lengths_N: torch.Tensor, *, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Generalized advantage estimation (arXiv:1506.02438): [A].

    A_t = d_t + gamma * gae_lambda * A_(t+1), d_t = r_t + gamma * V_(t+1) - V_t. V and A are 0 after the last token of a
    completion, whether it is finished or truncated.
    """
    advantages_A = torch.zeros_like(rewards_A)
    ends_N = lengths_N.cumsum(0)
    # All completions at once, from the last token of each backwards.
    next_value_N, advantage_N = (torch.zeros(len(lengths_N), dtype=rewards_A.dtype) for _ in range(2))
    for distance in range(1, int(lengths_N.max()) + 1):
        rows = lengths_N >= distance
        tokens = (ends_N - distance)[rows]
        delta = rewards_A[tokens] + gamma * next_value_N[rows] - values_A[tokens]
        advantage_N[rows] = delta + gamma * gae_lambda * advantage_N[rows]
        next_value_N[rows] = values_A[tokens]
        advantages_A[tokens] = advantage_N[rows]
    return advantages_A


def overlong_penalty(lengths_N: torch.Tensor, *, max_tokens: int, buffer: int) -> torch.Tensor:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): float64 [N].

    0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`.
    """
    return ((max_tokens - buffer - lengths_N).to(torch.float64) / max(buffer, 1)).clamp(-1, 0)


def zero_variance_groups(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """Whether the scored completions of a completion's group have equal rewards: bool [N].

    Equal means the same as in rewards.variance.is_zero_variance.
    """
    scored_N, count = rewards_N.isfinite(), int(groups_N.max()) + 1
    values, groups = rewards_N[scored_N], groups_N[scored_N]

    def reduce(values: torch.Tensor, operation: str) -> torch.Tensor:
        empty_G = torch.zeros(count, dtype=values.dtype)
        return empty_G.scatter_reduce(0, groups, values, operation, include_self=False)

    range_G = reduce(values, "amax") - reduce(values, "amin")
    return (range_G <= TOLERANCE * reduce(values.abs(), "amax"))[groups_N]


def _centered(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards minus the mean of their group [N], and the number of scored completions per group, at least 1 [G]."""
    scored_N = rewards_N.isfinite()
    values_N = torch.where(scored_N, rewards_N, torch.zeros_like(rewards_N))
    count_G = segment_sums(scored_N.to(rewards_N), groups_N).clamp_min(1)
    mean_N = (segment_sums(values_N, groups_N) / count_G)[groups_N]
    centered_N = rewards_N - mean_N
    has_signal_N = scored_N & ~zero_variance_groups(rewards_N, groups_N) & ~_is_rounding(centered_N, mean_N)
    return torch.where(has_signal_N, centered_N, torch.zeros_like(centered_N)), count_G


def _is_rounding(centered: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Whether a difference from the mean is at most 8 eps: the mean of equal numbers may differ from them by that."""
    return centered.abs() <= 8 * torch.finfo(centered.dtype).eps * mean.abs()


def _standard_deviation(values: torch.Tensor) -> torch.Tensor:
    return values.std() if len(values) > 1 else torch.zeros((), dtype=values.dtype)
