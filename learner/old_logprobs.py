"""The pass over a batch without gradient, for algorithms that must know every token before they train on it."""

from collections.abc import Iterable

import torch

from learner.algorithms.base import OldLogprobs
from learner.minibatches import MicroBatch
from learner.model.critic import Critic
from learner.model.policy import Policy
from learner.parallel.data_parallel import DataParallel


@torch.no_grad()
def precompute_logprobs(
    batches: Iterable[MicroBatch],
    size: int,
    *,
    policy: Policy,
    needs_reference: bool,
    critic: Critic | None,
    data_parallel: DataParallel,
) -> OldLogprobs:
    """Log-probabilities of all `size` sampled tokens by the policy and, if required, the base model, and their values.

    `batches` are this rank's share; the sum over the ranks is the whole.
    """
    columns = {"old": torch.zeros(size, device=policy.device)}
    if needs_reference:
        columns["reference"] = torch.zeros(size, device=policy.device)
    if critic is not None:
        columns["values"] = torch.zeros(size, device=policy.device)
    for batch in batches:
        tokens = policy.logprobs(batch, keep_hidden=critic is not None)
        reference_T = reference_logprobs(policy, batch) if needs_reference else None
        if batch.is_padding:
            continue
        columns["old"][batch.token_T] = tokens.logprobs_T
        if critic is not None and tokens.hidden_TH is not None:
            columns["values"][batch.token_T] = critic.values(tokens.hidden_TH)
        if reference_T is not None:
            columns["reference"][batch.token_T] = reference_T
    for column in columns.values():
        data_parallel.all_reduce(column)
    on_host = {name: column.cpu() for name, column in columns.items()}
    return OldLogprobs(on_host["old"], on_host.get("reference"), on_host.get("values"))


def reference_logprobs(policy: Policy, batch: MicroBatch) -> torch.Tensor:
    """What the base model gives to each sampled token (float32 [T], without gradient)."""
    with policy.reference():
        return policy.logprobs(batch).logprobs_T
