"""Advantages: how much better a completion, or a token, is than what was to be expected. Pure functions of tensors.

Suffixes: N completions of the batch, A their tokens one after the other. NaN marks a completion without a reward; its
advantage is 0.
"""

import torch

from learner.segments import segment_sums
from rewards.variance import TOLERANCE

EPSILON = 1e-4  # added to standard deviations, as TRL does


def group_relative(
    rewards_N: torch.Tensor, groups_N: torch.Tensor, *, scale: str = "group", epsilon: float = EPSILON
) -> torch.Tensor:
    """A = (r - mean of its group) / (s + epsilon), over scored completions; a flat group gives exactly 0.

    `scale` says what s is: "group", the standard deviation in the group (GRPO, DeepSeekMath, arXiv:2402.03300); "batch", that
    of all rewards (arXiv:2508.08221); "none", A = r - mean (Dr. GRPO, arXiv:2503.20783). `groups_N` numbers the groups from 0.
    Standard deviations are the sample's (divided by the count less one), as in TRL and verl (the paper says neither), so
    that [1, 0, 0, 1] gives +-0.866.
    """
    centred_N, count_G = _centred(rewards_N, groups_N)
    if scale == "none":
        return centred_N
    if scale == "batch":
        return centred_N / (_deviation(rewards_N[rewards_N.isfinite()]) + epsilon)
    std_N = (segment_sums(centred_N.square(), groups_N) / (count_G - 1).clamp_min(1)).sqrt()[groups_N]
    return centred_N / (std_N + epsilon)


def leave_one_out(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv:2402.14740): A = r - mean of the others in the group, = n / (n - 1) * (r - mean of the n scored); 0 for one
    that is alone."""
    centred_N, count_G = _centred(rewards_N, groups_N)
    count_N = count_G[groups_N]
    return centred_N * count_N / (count_N - 1).clamp_min(1)


def terms_normalised(
    terms: dict[str, torch.Tensor], weights: dict[str, float], groups_N: torch.Tensor, *, epsilon: float = EPSILON
) -> torch.Tensor:
    """GDPO (arXiv:2601.05242): each term of the reward normalised in its group by itself, then the weighted sum of those that
    apply to a completion normalised over the batch. A term that is NaN does not apply."""
    total_N = torch.zeros(len(groups_N), dtype=torch.float64)
    scored_N = torch.zeros(len(groups_N), dtype=torch.bool)
    for name, values_N in terms.items():
        total_N += weights.get(name, 1.0) * group_relative(values_N, groups_N, epsilon=epsilon)
        scored_N |= values_N.isfinite()
    values = total_N[scored_N]
    mean = values.mean() if len(values) else 0.0
    # Where every group is flat, the rest is rounding.
    moves = bool(total_N.any())
    return torch.where(scored_N & moves, (total_N - mean) / (_deviation(values) + epsilon), torch.zeros_like(total_N))


def batch_normalised(values_A: torch.Tensor, used_A: torch.Tensor, *, epsilon: float = EPSILON) -> torch.Tensor:
    """REINFORCE++ (arXiv:2501.03262): A = (v - mean) / (std + epsilon) over the tokens `used_A` of the batch; 0 for the others,
    and for all where they are equal."""
    values = values_A[used_A]
    if len(values) < 2:
        return torch.zeros_like(values_A)
    mean = values.mean()
    centred_A = torch.where(used_A & ~_is_rounding(values_A - mean, mean), values_A - mean, torch.zeros_like(values_A))
    return centred_A / (_deviation(values) + epsilon)


def reward_to_go(rewards_A: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
    """Of each token, the sum of the rewards from it to the end of its completion."""
    return generalised(rewards_A, torch.zeros_like(rewards_A), lengths_N, gamma=1.0, decay=1.0)


def generalised(
    rewards_A: torch.Tensor, values_A: torch.Tensor, lengths_N: torch.Tensor, *, gamma: float, decay: float
) -> torch.Tensor:
    """Generalised advantage estimation (arXiv:1506.02438): A_t = d_t + gamma * decay * A_(t+1),
    d_t = r_t + gamma * V_(t+1) - V_t, where V and A are 0 after a completion's last token, also of one that was cut off."""
    advantages_A = torch.zeros_like(rewards_A)
    ends = lengths_N.cumsum(0)
    # All completions at once, from their last tokens backwards.
    next_value_N, advantage_N = (torch.zeros(len(lengths_N), dtype=rewards_A.dtype) for _ in range(2))
    for back in range(1, int(lengths_N.max()) + 1):
        rows = lengths_N >= back
        at = (ends - back)[rows]
        step = rewards_A[at] + gamma * next_value_N[rows] - values_A[at]
        advantage_N[rows] = step + gamma * decay * advantage_N[rows]
        next_value_N[rows] = values_A[at]
        advantages_A[at] = advantage_N[rows]
    return advantages_A


def overlong_penalty(lengths_N: torch.Tensor, *, max_tokens: int, buffer: int) -> torch.Tensor:
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): 0 up to `max_tokens - buffer` tokens, then falling in a
    line to -1 at `max_tokens`. Float64 [N]."""
    return ((max_tokens - buffer - lengths_N).to(torch.float64) / max(buffer, 1)).clamp(-1, 0)


def flat_groups(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> torch.Tensor:
    """Whether the scored completions of a completion's group have equal rewards (bool [N]), as rewards.variance says."""
    scored_N, count = rewards_N.isfinite(), int(groups_N.max()) + 1
    values, groups = rewards_N[scored_N], groups_N[scored_N]

    def reduced(values: torch.Tensor, how: str) -> torch.Tensor:
        empty_G = torch.zeros(count, dtype=values.dtype)
        return empty_G.scatter_reduce(0, groups, values, how, include_self=False)

    spread_G = reduced(values, "amax") - reduced(values, "amin")
    return (spread_G <= TOLERANCE * reduced(values.abs(), "amax"))[groups_N]


def _centred(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards less their group's mean, and the number of scored ones in each group [G]."""
    scored_N = rewards_N.isfinite()
    values_N = torch.where(scored_N, rewards_N, torch.zeros_like(rewards_N))
    count_G = segment_sums(scored_N.to(rewards_N), groups_N).clamp_min(1)
    mean_N = (segment_sums(values_N, groups_N) / count_G)[groups_N]
    centred_N = rewards_N - mean_N
    moves_N = scored_N & ~flat_groups(rewards_N, groups_N) & ~_is_rounding(centred_N, mean_N)
    return torch.where(moves_N, centred_N, torch.zeros_like(centred_N)), count_G


def _is_rounding(centred: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """A mean of equal numbers may differ from them in the last bit: such a rest is rounding, not signal."""
    return centred.abs() <= 8 * torch.finfo(centred.dtype).eps * mean.abs()


def _deviation(values: torch.Tensor) -> torch.Tensor:
    return values.std() if len(values) > 1 else torch.zeros((), dtype=values.dtype)
