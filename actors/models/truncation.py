"""Truncated sampling: which tokens may be drawn. The engine that samples and the learner that trains share it.

The order is vLLM's: min_p, then top_k, then top_p, each on what the one before has left. Knows tensors only. Suffixes:
T tokens, V vocabulary.
"""

import torch

from actors.types import Truncation

# A logit that gives the probability 0 in every dtype. Infinity would make 0 * log 0 NaN.
EXCLUDED = -1e4
SORTED_ROWS = 32  # sorted at a time: a sort takes several times the memory of the logits


def truncate_in_place(
    logits_TV: torch.Tensor, truncation: Truncation, *, temperature: float, targets_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Set the logits of tokens that may not be drawn at this temperature to EXCLUDED, but never those of `targets_T`.

    A token that was drawn may be one that today's policy would exclude; it keeps its probability beside the others.
    """
    if truncation.is_off:
        return logits_TV
    for start in range(0, len(logits_TV), SORTED_ROWS):
        rows_TV = logits_TV[start : start + SORTED_ROWS]
        excluded_TV = _excluded(rows_TV.float() / temperature, truncation)
        if targets_T is not None:
            excluded_TV.scatter_(1, targets_T[start : start + SORTED_ROWS, None], False)
        rows_TV.masked_fill_(excluded_TV, EXCLUDED)
    return logits_TV


def _excluded(scaled_TV: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    excluded_TV = torch.zeros_like(scaled_TV, dtype=torch.bool)
    if truncation.min_p > 0:
        probabilities_TV = scaled_TV.softmax(1)
        excluded_TV |= probabilities_TV < truncation.min_p * probabilities_TV.amax(1, keepdim=True)
        scaled_TV = scaled_TV.masked_fill(excluded_TV, float("-inf"))
    if 0 < truncation.top_k < scaled_TV.shape[1]:
        lowest_T1 = scaled_TV.topk(truncation.top_k, dim=1).values[:, -1:]
        excluded_TV |= scaled_TV < lowest_T1
        scaled_TV = scaled_TV.masked_fill(excluded_TV, float("-inf"))
    if truncation.top_p < 1:
        ascending_TV, order_TV = scaled_TV.sort(1)
        rest_TV = ascending_TV.softmax(1).cumsum(1) <= 1 - truncation.top_p
        rest_TV[:, -1] = False
        excluded_TV |= torch.zeros_like(rest_TV).scatter_(1, order_TV, rest_TV)
    return excluded_TV
