"""Losses on pairs of completions of a prompt: the better (chosen) and the worse (rejected). Pure functions of tensors.

`margins_P` is h = (policy - reference) of the chosen completion minus that of the rejected one, where each
log-probability is the sum over the completion's tokens. Suffixes: P pairs, N completions of the batch.
"""

import torch

from rewards.variance import is_zero_variance


def sigmoid(margins_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """DPO (arXiv:2305.18290, equation 7): -log sigmoid(beta h)."""
    return -torch.nn.functional.logsigmoid(beta * margins_P)


def ipo(margins_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """IPO (arXiv:2310.12036, equation 17): (h - 1 / (2 beta))^2."""
    return (margins_P - 1 / (2 * beta)).square()


def hinge(margins_P: torch.Tensor, *, beta: float) -> torch.Tensor:
    """SLiC's hinge loss on DPO's margin (arXiv:2309.06657): max(0, 1 - beta h)."""
    return (1 - beta * margins_P).clamp_min(0)


LOSSES = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


def best_and_worst(rewards_N: torch.Tensor, groups_N: torch.Tensor) -> tuple[list[tuple[int, int]], int]:
    """The (best, worst) completion of each group by reward, and the number of groups without a pair.

    Where rewards are equal, the first completion wins. Completions whose reward is NaN are ignored. A group whose
    rewards are all equal (as in rewards.variance.is_zero_variance), or all NaN, is a tie and has no pair. `groups_N`
    numbers the groups from 0.
    """
    pairs, ties = [], 0
    for group in range(int(groups_N.max()) + 1):
        rows = ((groups_N == group) & rewards_N.isfinite()).nonzero()[:, 0]
        if not len(rows) or is_zero_variance(rewards_N[rows].tolist()):
            ties += 1
            continue
        pairs.append((int(rows[rewards_N[rows].argmax()]), int(rows[rewards_N[rows].argmin()])))
    return pairs, ties
