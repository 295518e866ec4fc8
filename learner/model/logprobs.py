"""Log-probabilities and entropy of given tokens, from hidden states, in chunks.

The full logits (tokens x vocabulary) never exist. The gradient of a token's log-probability with respect to its
hidden state does not depend on the loss, so the forward pass computes it while it has the chunk's probabilities, and
backward is one multiplication: no chunk is computed twice. Knows tensors only. Suffixes: T tokens, H hidden, V
vocabulary.
"""

from typing import Protocol, cast

import torch

from actors.models.families import LogitTransform
from actors.models.truncation import truncate_in_place
from actors.types import Truncation
from learner.model.softmax import softmax_in_place

PLAIN = LogitTransform()
EVERY_TOKEN = Truncation()


class _Context(Protocol):
    """What torch passes to an autograd function."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[torch.Tensor, ...]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None: ...


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_TH: torch.Tensor,
        head_VH: torch.Tensor,
        targets_T: torch.Tensor,
        temperature: float,
        transform: LogitTransform,
        truncation: Truncation,
        chunk: int,
        entropy_requires_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        logprobs, entropies = [], []  # one tensor per chunk
        # With respect to the hidden states, of the log-probabilities and the entropies.
        wanted = (1 + entropy_requires_grad) if needs_gradient else 0
        gradients = [torch.empty_like(hidden_TH) for _ in range(wanted)]
        for start in range(0, len(targets_T), chunk):
            hidden, targets = hidden_TH[start : start + chunk].to(head_VH.dtype), targets_T[start : start + chunk]
            logits_TV, slope_TV = _transform_in_place(hidden @ head_VH.T, transform)
            truncate_in_place(logits_TV, truncation, temperature=temperature, targets_T=targets)
            probabilities_TV, logprobs_T, entropy_T = softmax_in_place(logits_TV, targets, temperature=temperature)
            logprobs.append(logprobs_T)
            entropies.append(entropy_T)
            if not needs_gradient:
                continue
            if entropy_requires_grad:
                # dH/dz = -p (log p + H) for each logit z; 0 where p is too small for its logarithm.
                logit_gradient_TV = -torch.special.xlogy(probabilities_TV, probabilities_TV)
                logit_gradient_TV -= probabilities_TV * entropy_T[:, None].to(probabilities_TV.dtype)
                if slope_TV is not None:
                    logit_gradient_TV *= slope_TV
                gradient_TH = (logit_gradient_TV @ head_VH).mul_(transform.scale / temperature)
                gradients[1][start : start + chunk] = gradient_TH
            towards_target = head_VH[targets]
            if slope_TV is not None:
                probabilities_TV *= slope_TV
                towards_target *= slope_TV.gather(1, targets[:, None])
            gradient_TH = (towards_target - probabilities_TV @ head_VH).mul_(transform.scale / temperature)
            gradients[0][start : start + chunk] = gradient_TH
        ctx.save_for_backward(*gradients)
        entropy_T = torch.cat(entropies)
        if not entropy_requires_grad:
            ctx.mark_non_differentiable(entropy_T)
        return torch.cat(logprobs), entropy_T

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor | int, *tuple[None, ...]]:
        total_TH = sum(
            gradient_T[:, None].to(saved_TH.dtype) * saved_TH
            for gradient_T, saved_TH in zip(gradients, ctx.saved_tensors, strict=False)
        )
        return total_TH, None, None, None, None, None, None, None


def _transform_in_place(
    product_TV: torch.Tensor, transform: LogitTransform
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits, and their derivatives with respect to scale * z (None: 1). Overwrites `product_TV`."""
    if transform.scale != 1:
        product_TV.mul_(transform.scale)
    if transform.softcap is None:
        return product_TV, None
    product_TV.div_(transform.softcap).tanh_()
    slope_TV = 1 - product_TV * product_TV
    return product_TV.mul_(transform.softcap), slope_TV


def token_logprobs(
    hidden_TH: torch.Tensor,
    head_VH: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    temperature: float,
    chunk: int,
    transform: LogitTransform = PLAIN,
    truncation: Truncation = EVERY_TOKEN,
    entropy_requires_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target | hidden) and entropy in nats, both float32 [T], of softmax(logits / temperature).

    The logits are those of `transform` on hidden @ head.T. With a `truncation` the distribution is that of the tokens
    which it leaves, and of the target.
    The logits of `chunk` tokens exist at a time. Gradients flow to `hidden_TH` only, because the head is frozen;
    those of the entropy only with `entropy_requires_grad`, which costs one more product with the head.
    """
    return cast(
        "tuple[torch.Tensor, torch.Tensor]",
        _TokenLogprobs.apply(
            hidden_TH, head_VH, targets_T, temperature, transform, truncation, chunk, entropy_requires_grad
        ),
    )
