"""PolicyGradient: an algorithm that is a recipe of an advantage, a surrogate and weights.

Knows tensors and the pure functions of learner/losses; knows neither models nor optimizers. Suffixes as in base.py.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from conf.schema import AlgorithmSettings
from learner.algorithms.base import Advantages, LossInputs, OldLogprobs
from learner.algorithms.recipe import AdvantageInputs, Recipe
from learner.batch import RewardedBatch
from learner.losses import advantages, kl, surrogates
from learner.losses.aggregation import AGGREGATIONS


class PolicyGradient:
    """The sum over tokens of weight * (importance * surrogate + coefficient * KL).

    The surrogate compares the policy with the one at the start of the step ("old"), as the learner computes it; with
    one optimizer step per batch that is the policy itself, detached. Deviations from the papers: each token is
    multiplied by an importance weight old / behavior (surrogates.importance_weights), because the engine that sampled
    is not exactly the learner; and trajectories without a reward, or masked because they were cut off, count neither
    in means nor in weights (TRL counts them in the number of completions).
    """

    def __init__(
        self, recipe: Recipe, settings: AlgorithmSettings, *, max_tokens: int, term_weights: Mapping[str, float]
    ) -> None:
        self.settings = settings
        self.kl_coefficient = settings.kl_coefficient
        self._recipe = recipe
        self._max_tokens = max_tokens
        self._term_weights = term_weights
        asked = settings.loss_aggregation
        self._aggregation = recipe.aggregation if asked is None else AGGREGATIONS[asked]

    @property
    def reference_in_loss(self) -> bool:
        return self.settings.kl_coefficient != 0 and self.settings.kl_placement == "loss"

    @property
    def reference_in_reward(self) -> bool:
        return self.settings.kl_coefficient != 0 and self.settings.kl_placement == "reward"

    @property
    def has_critic(self) -> bool:
        return self._recipe.has_critic

    def prepare(self, batch: RewardedBatch, old: OldLogprobs | None) -> Advantages:
        settings, counted_N = self.settings, batch.rewards_N.isfinite()
        if settings.mask_truncated:
            counted_N = counted_N & ~batch.truncated_N
        if settings.zero_variance_groups != "keep":
            counted_N = counted_N & ~advantages.zero_variance_groups(batch.rewards_N, batch.groups_N)
        if settings.overlong_buffer:
            penalty_N = advantages.overlong_penalty(
                batch.lengths_N, max_tokens=self._max_tokens, buffer=round(settings.overlong_buffer * self._max_tokens)
            )
            batch = replace(batch, rewards_N=batch.rewards_N + penalty_N)
        inputs = AdvantageInputs(
            batch,
            counted_N,
            settings,
            self._term_weights,
            penalty_A=self._kl_penalty(old),
            values_A=None if old is None else old.values_A,
        )
        advantages_A, returns_A = self._recipe.advantage(inputs)
        advantages_A = torch.where(batch.per_token(counted_N), advantages_A, 0.0)
        has_gradient_N = counted_N
        if not (self.reference_in_loss or settings.entropy_coefficient or self.has_critic):
            # A trajectory without advantage has no gradient.
            has_gradient_N = counted_N & (batch.sums(advantages_A.abs()) > 0)
        units = [(row,) for row in has_gradient_N.nonzero()[:, 0].tolist()]
        return Advantages(units, counted_N, advantages_A, returns_A)

    def _kl_penalty(self, old: OldLogprobs | None) -> torch.Tensor | None:
        if not self.reference_in_reward:
            return None
        assert old is not None and old.reference_logprobs_A is not None
        estimate = kl.ESTIMATORS[self.settings.kl_estimator](old.old_logprobs_A, old.reference_logprobs_A)
        return self.kl_coefficient * estimate.double()

    def weights(self, batch: RewardedBatch, counted_N: torch.Tensor) -> torch.Tensor:
        return self._aggregation(batch.lengths_N, counted_N, self._max_tokens)

    def loss(self, inputs: LossInputs) -> torch.Tensor:
        loss_T = self._recipe.surrogate(inputs, self.settings)
        if self.settings.importance_sampling_cap is not None:
            loss_T = loss_T * self._importance_weights(inputs, cap=self.settings.importance_sampling_cap)
        if self.reference_in_loss and inputs.reference_logprobs_T is not None:
            estimate = kl.ESTIMATORS[self.settings.kl_estimator]
            loss_T = loss_T + self.kl_coefficient * estimate(inputs.policy_logprobs_T, inputs.reference_logprobs_T)
        return (loss_T * inputs.weights_T).sum()

    def clipped(self, inputs: LossInputs) -> torch.Tensor:
        if self._recipe.ratio is None:
            return torch.zeros_like(inputs.policy_logprobs_T, dtype=torch.bool)
        ratio_T, settings = self._recipe.ratio(inputs), self.settings
        return surrogates.is_clipped(ratio_T, inputs.advantages_T, low=settings.clip_low, high=settings.clip_high)

    def over_cap(self, inputs: LossInputs) -> torch.Tensor:
        cap = self.settings.importance_sampling_cap
        if cap is None:
            return torch.zeros_like(inputs.policy_logprobs_T, dtype=torch.bool)
        return self._importance_weights(inputs, cap=float("inf")) > cap

    def _importance_weights(self, inputs: LossInputs, *, cap: float) -> torch.Tensor:
        return surrogates.importance_weights(
            inputs.old_logprobs_T,
            inputs.behavior_logprobs_T,
            inputs.rows_T,
            cap=cap,
            level=self.settings.importance_sampling_level,
            mode=self.settings.importance_sampling_mode,
        )
