"""The first pass over a batch, without gradient, for algorithms that must know it before they train on it."""

from collections.abc import Iterable

import torch

from learner.batch import MicroBatch
from learner.critic import Critic
from learner.objectives import Objective
from learner.policy import Policy
from learner.ranks import Ranks
from learner.terms import Survey


@torch.no_grad()
def survey(
    batches: Iterable[MicroBatch], size: int, policy: Policy, objective: Objective, critic: Critic | None, ranks: Ranks
) -> Survey:
    """The log-probabilities of all `size` tokens of the batch by the policy and the reference, and their values, as far as they
    are needed. `batches` are this rank's share of it; the ranks add up what they found."""
    needs_reference = objective.needs_reference or objective.surveys_reference
    wanted = {"old": True, "reference": needs_reference, "values": critic is not None}
    found = {name: torch.zeros(size, device=policy.device) for name, is_wanted in wanted.items() if is_wanted}
    for batch in batches:
        tokens = policy.logprobs(batch, keep_hidden=critic is not None)
        found["old"][batch.token_T] = tokens.logprobs_T
        if critic is not None and tokens.hidden_TH is not None:
            found["values"][batch.token_T] = critic.values(tokens.hidden_TH)
        if needs_reference:
            with policy.reference():
                found["reference"][batch.token_T] = policy.logprobs(batch).logprobs_T
    for values in found.values():
        ranks.add_up(values)
    on_cpu = {name: values.cpu() for name, values in found.items()}
    return Survey(on_cpu["old"], on_cpu.get("reference"), on_cpu.get("values"))
