"""From per-token losses to one number: the weight of each token, fixed over the full batch. Pure functions.

The weights are made once from the lengths of all completions that an optimizer step trains, so micro-batches and ranks
simply add. `used_N` (bool) says which completions count. Each returns the weight of one token of each completion, [N].
"""

from collections.abc import Callable
from functools import partial

import torch

Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def per_sequence(lengths_N: torch.Tensor, used_N: torch.Tensor) -> torch.Tensor:
    """GRPO: completions count the same, so each token 1 / (completions * length)."""
    return _share(used_N) / lengths_N.clamp_min(1)


def per_token(lengths_N: torch.Tensor, used_N: torch.Tensor) -> torch.Tensor:
    """DAPO (arXiv:2503.14476): tokens count the same, 1 / (all tokens)."""
    used = used_N.to(torch.float32)
    return used / (used * lengths_N).sum().clamp_min(1)


def constant(lengths_N: torch.Tensor, used_N: torch.Tensor, *, max_tokens: int) -> torch.Tensor:
    """Dr. GRPO (arXiv:2503.20783): 1 / (completions * max_tokens), so that no length is favoured."""
    return _share(used_N) / max_tokens


def whole(lengths_N: torch.Tensor, used_N: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv:2402.14740): a completion is one action whose log-probability is the sum of its tokens', 1 / completions."""
    return _share(used_N)


def by_name(name: str, *, max_tokens: int) -> Weights:
    """sequence, token, constant or whole."""
    return {
        "sequence": per_sequence,
        "token": per_token,
        "constant": partial(constant, max_tokens=max_tokens),
        "whole": whole,
    }[name]


def _share(used_N: torch.Tensor) -> torch.Tensor:
    used = used_N.to(torch.float32)
    return used / used.sum().clamp_min(1)
