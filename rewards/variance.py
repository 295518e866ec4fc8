"""When the rewards of a group count as equal: the definition that replay, metrics and learner share. Plain Python."""

from collections.abc import Sequence

# Sums of the same terms in another order differ by about 1e-16 of their size; a difference of 1e-6 may be meant.
TOLERANCE = 1e-9


def is_zero_variance(rewards: Sequence[float]) -> bool:
    """Whether `rewards` differ by at most TOLERANCE of the largest magnitude among them, so that they teach nothing."""
    return max(rewards) - min(rewards) <= TOLERANCE * max(map(abs, rewards))
