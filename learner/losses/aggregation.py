"""From per-token losses to one number: the weight of each token, fixed over the full batch. Pure functions of tensors.

The loss is the sum over tokens of weight * loss. The weights are computed once from the lengths of all completions of
an optimizer step, so that micro-batches and ranks only add. Each function takes the lengths in tokens [N], a bool [N]
of the completions that count, and the limit on a length (sampling.max_tokens). It returns the weight of one token of
each completion, float32 [N], which is 0 for completions that do not count. Suffix N: completions of the optimizer step.
"""

from collections.abc import Callable

import torch

Aggregation = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def sequence_mean(lengths_N: torch.Tensor, counted_N: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """GRPO (arXiv:2402.03300): the mean over completions of the mean over tokens, 1 / (completions * length)."""
    return _completion_mean(counted_N) / lengths_N.clamp_min(1)


def token_mean(lengths_N: torch.Tensor, counted_N: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """DAPO (arXiv:2503.14476): the mean over all tokens of the batch, 1 / tokens."""
    ones_N = counted_N.to(torch.float32)
    return ones_N / (ones_N * lengths_N).sum().clamp_min(1)


def constant_length(lengths_N: torch.Tensor, counted_N: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """Dr. GRPO (arXiv:2503.20783): 1 / (completions * max_tokens), so that no length is favored."""
    return _completion_mean(counted_N) / max_tokens


def sequence_sum(lengths_N: torch.Tensor, counted_N: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """RLOO (arXiv:2402.14740): the mean over completions of the sum over tokens, 1 / completions."""
    return _completion_mean(counted_N)


def _completion_mean(counted_N: torch.Tensor) -> torch.Tensor:
    """1 / (number of counted completions) for those that count, 0 for the others."""
    ones_N = counted_N.to(torch.float32)
    return ones_N / ones_N.sum().clamp_min(1)


# By the names that algorithm.loss_aggregation takes.
AGGREGATIONS: dict[str, Aggregation] = {
    function.__name__: function for function in (sequence_mean, token_mean, constant_length, sequence_sum)
}
