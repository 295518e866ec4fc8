"""Online DPO: of each group the best completion against the worst. Suffixes as in base.py, and P pairs."""

import torch

from conf.schema import AlgorithmSettings
from learner.algorithms.base import Advantages, LossInputs, OldLogprobs
from learner.batch import RewardedBatch
from learner.losses import preferences
from learner.losses.segments import segment_sums


class OnlineDPO:
    """Online DPO (arXiv:2402.04792), with one of preferences.LOSSES.

    The reference is the model without the adapter. A group without two different rewards is a tie and has no pair.
    Weights are 1 / pairs; nothing is clipped, and no importance weight corrects for the engine, because the loss is not
    an expectation under it.
    """

    reference_in_loss = True
    reference_in_reward = False
    has_critic = False

    def __init__(self, settings: AlgorithmSettings) -> None:
        self.settings = settings
        self.kl_coefficient = 0.0

    def prepare(self, batch: RewardedBatch, old: OldLogprobs | None) -> Advantages:
        rewards_N = batch.rewards_N
        if self.settings.mask_truncated:
            rewards_N = rewards_N.masked_fill(batch.truncated_N, float("nan"))
        pairs, ties = preferences.best_and_worst(rewards_N, batch.groups_N)
        signs_N = torch.zeros_like(rewards_N)
        for best, worst in pairs:
            signs_N[best], signs_N[worst] = 1.0, -1.0
        return Advantages(pairs, signs_N != 0, batch.per_token(signs_N), pairs=len(pairs), ties=ties)

    def weights(self, batch: RewardedBatch, counted_N: torch.Tensor) -> torch.Tensor:
        counted = counted_N.to(torch.float32)
        return counted / (counted.sum() / 2).clamp_min(1)

    def loss(self, inputs: LossInputs) -> torch.Tensor:
        assert inputs.reference_logprobs_T is not None
        # The sign of a token's advantage says whether its completion is the chosen or the rejected one of its pair; the
        # two follow each other in the stream.
        signed_T = inputs.advantages_T * (inputs.policy_logprobs_T - inputs.reference_logprobs_T)
        pairs_T = inputs.rows_T.unique_consecutive(return_inverse=True)[1] // 2
        margins_P = segment_sums(signed_T, pairs_T)
        first_P = torch.cat([pairs_T.new_ones(1), pairs_T.diff()]).nonzero()[:, 0]
        dpo = self.settings.online_dpo
        losses_P = preferences.LOSSES[dpo.preference_loss](margins_P, beta=dpo.beta)
        return (losses_P * inputs.weights_T[first_P]).sum()

    def clipped(self, inputs: LossInputs) -> torch.Tensor:
        return torch.zeros_like(inputs.policy_logprobs_T, dtype=torch.bool)

    def over_cap(self, inputs: LossInputs) -> torch.Tensor:
        return torch.zeros_like(inputs.policy_logprobs_T, dtype=torch.bool)
