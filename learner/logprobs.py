"""Log-probabilities and entropy of given tokens, from hidden states, in chunks.

The full logits (vocabulary x tokens) never exist. The gradient of a token's log-probability to its hidden state does
not depend on what comes after, so it is made in the forward pass while the chunk's probabilities are at hand, and
backward is one multiplication: no chunk is computed twice. Suffixes: T tokens, H hidden, V vocabulary.
"""

from typing import Any

import torch

from learner.softmax import softmax_


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        head_VH: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        logprobs, entropies, directions = [], [], []
        for start in range(0, len(targets_T), chunk):
            hidden, targets = hidden_TH[start : start + chunk].to(head_VH.dtype), targets_T[start : start + chunk]
            probabilities_TV, logprobs_T, entropy_T = softmax_(hidden @ head_VH.T, targets, temperature=temperature)
            logprobs.append(logprobs_T)
            entropies.append(entropy_T)
            if wants_gradient:
                directions.append((head_VH[targets] - probabilities_TV @ head_VH).div_(temperature))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(directions).to(hidden_TH.dtype))
        entropy_T = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_T)
        return torch.cat(logprobs), entropy_T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (directions_TH,) = ctx.saved_tensors
        return gradients[0][:, None].to(directions_TH.dtype) * directions_TH, None, None, None, None


def token_logprobs(
    hidden_TH: torch.Tensor, head_VH: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target | hidden) and entropy in nats, both float32 [T], of softmax(hidden @ head.T / temperature).

    `chunk` tokens' logits exist at a time. Gradients flow to `hidden_TH` only: the head is frozen.
    """
    return _TokenLogprobs.apply(hidden_TH, head_VH, targets_T, temperature, chunk)  # type: ignore[return-value]
