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
        entropy_moves: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        logprobs, entropies, directions, of_entropy = [], [], [], []
        for start in range(0, len(targets_T), chunk):
            hidden, targets = hidden_TH[start : start + chunk].to(head_VH.dtype), targets_T[start : start + chunk]
            probabilities_TV, logprobs_T, entropy_T = softmax_(hidden @ head_VH.T, targets, temperature=temperature)
            logprobs.append(logprobs_T)
            entropies.append(entropy_T)
            if wants_gradient:
                directions.append((head_VH[targets] - probabilities_TV @ head_VH).div_(temperature))
            if wants_gradient and entropy_moves:
                # dH/dz = -p (log p + H) of each logit z; 0 where p is too small for its logarithm.
                pull_TV = -torch.special.xlogy(probabilities_TV, probabilities_TV)
                pull_TV -= probabilities_TV * entropy_T[:, None].to(probabilities_TV.dtype)
                of_entropy.append((pull_TV @ head_VH).div_(temperature))
        if wants_gradient:
            ctx.save_for_backward(*(torch.cat(x).to(hidden_TH.dtype) for x in (directions, of_entropy) if x))
        entropy_T = torch.cat(entropies)
        if not entropy_moves:
            ctx.mark_non_differentiable(entropy_T)
        return torch.cat(logprobs), entropy_T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        total = sum(
            gradient_T[:, None].to(directions_TH.dtype) * directions_TH
            for gradient_T, directions_TH in zip(gradients, ctx.saved_tensors, strict=False)
        )
        return total, None, None, None, None, None  # type: ignore[return-value]


def token_logprobs(
    hidden_TH: torch.Tensor, head_VH: torch.Tensor, targets_T: torch.Tensor, *, temperature: float, chunk: int,
    entropy_moves: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """log p(target | hidden) and entropy in nats, both float32 [T], of softmax(hidden @ head.T / temperature).

    `chunk` tokens' logits exist at a time. Gradients flow to `hidden_TH` only: the head is frozen; those of the entropy only if
    it `entropy_moves`, which costs another product with the head.
    """
    return _TokenLogprobs.apply(hidden_TH, head_VH, targets_T, temperature, chunk, entropy_moves)  # type: ignore[return-value]
