"""From logits to probabilities in place, with the log-probability of a target and the entropy of each row.

On a GPU a Triton kernel (softmax_kernel.py) does it in two reads and one write of the logits; elsewhere plain torch,
which is the reference. Knows tensors only. Suffixes: T tokens, V vocabulary.
"""

import importlib.util

import torch


def softmax_in_place(
    logits_TV: torch.Tensor, targets_T: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(logits / temperature) [T, V], and log p(target) and entropy in nats (both float32 [T]).

    The probabilities have the dtype of the logits. 16-bit logits on a GPU, and float32 logits, are overwritten.
    """
    if logits_TV.is_cuda and logits_TV.dtype != torch.float32 and importlib.util.find_spec("triton") is not None:
        logprobs_T, entropy_T = (torch.empty(len(logits_TV), device=logits_TV.device) for _ in range(2))
        from learner.model.softmax_kernel import softmax_rows

        softmax_rows[(len(logits_TV),)](  # type: ignore[index]
            logits_TV,
            logits_TV.stride(0),
            targets_T,
            logprobs_T,
            entropy_T,
            logits_TV.shape[1],
            1 / temperature,
            BLOCK=4096,
            num_warps=8,
        )
        return logits_TV, logprobs_T, entropy_T
    scaled_TV = logits_TV.float().div_(temperature)
    logprobs_TV = scaled_TV.sub_(scaled_TV.logsumexp(1, keepdim=True))
    probabilities_TV = logprobs_TV.exp()
    entropy_T = -torch.linalg.vecdot(probabilities_TV, logprobs_TV)
    return probabilities_TV.to(logits_TV.dtype), logprobs_TV.gather(1, targets_T[:, None])[:, 0], entropy_T
