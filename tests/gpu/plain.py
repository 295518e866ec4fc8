"""Log-probabilities of the learner's own model by a pass of its own for each completion, without packing."""

import torch

from learner.attention import Packing, Segment
from learner.batch import Rollouts
from learner.policy import Policy


def plain_logprobs(policy: Policy, rollouts: Rollouts) -> torch.Tensor:
    found = []
    for tokens, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
        ids = torch.tensor(tokens, dtype=torch.long, device=policy.device)
        hidden = policy._decoder(
            input_ids=ids[None], position_ids=torch.arange(len(ids), device=policy.device)[None], use_cache=False,
            packing=Packing([Segment(0, len(ids))], policy.device),
        ).last_hidden_state[0]  # fmt: skip
        logprobs = (hidden @ policy._head_VH.T).float().log_softmax(-1)[start - 1 : -1]
        found.append(logprobs.gather(1, ids[start:, None])[:, 0])
    return torch.cat(found)
