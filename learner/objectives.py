"""Objectives: each algorithm as advantages, weights, and a loss that only sums.

RECIPES is the table of algorithms that take policy gradients; PPO adds values, OnlineDPO has pairs. An objective's
`prepare` sees the whole batch once, without gradient; its `loss` sees micro-batches. Knows tensors; knows neither Arrow,
models nor optimizers. Suffixes as in learner/terms.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from conf.schema import AlgorithmSettings
from learner import advantages, aggregation, kl, preferences, surrogates
from learner.segments import segment_sums
from learner.terms import Prepared, Scored, Survey, TokenTerms


class Objective(Protocol):
    """An algorithm. `max_tokens` is where completions are cut, `term_weights` those of the reward's terms."""

    settings: AlgorithmSettings
    # Whether the loss needs log-probabilities of the reference; whether advantages need it, too, and need values.
    needs_reference: bool
    surveys_reference: bool
    has_critic: bool
    # The weight of KL, which `adapt` may move.
    kl_coefficient: float

    def __init__(self, settings: AlgorithmSettings, *, max_tokens: int, term_weights: Mapping[str, float]) -> None: ...

    def prepare(self, batch: Scored, survey: Survey | None) -> Prepared: ...

    def weights(self, batch: Scored, used_N: torch.Tensor) -> torch.Tensor:
        """The weight of one token of each completion, where `used_N` are those that this optimizer step counts."""
        ...

    def loss(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor: ...

    def clipped(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        """Which tokens the clip cuts off from the gradient (bool [T])."""
        ...

    def over_cap(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        """The importance weight of which tokens is over its cap (bool [T])."""
        ...


@dataclass(frozen=True)
class Recipe:
    """A policy gradient: names of an advantage, a surrogate and weights (learner/aggregation.py)."""

    advantage: str
    surrogate: str
    weights: str


RECIPES = {
    # DeepSeekMath, arXiv:2402.03300, equation 3: 1/N sum_i 1/T_i sum_t min(w A, clip(w) A).
    "grpo": Recipe("group", "token_clip", "sequence"),
    # arXiv:2503.20783: no division by the deviation, none by the length.
    "dr_grpo": Recipe("centred", "token_clip", "constant"),
    # arXiv:2503.14476, equation 8: 1 / sum T_i, clip_high over clip_low, flat groups sampled again, overlong penalty.
    "dapo": Recipe("group", "token_clip", "token"),
    # arXiv:2507.18071, equation 5: one ratio a completion.
    "gspo": Recipe("group", "sequence_clip", "sequence"),
    # MiniMax-M1, arXiv:2506.13585, equation 4: the weight is clipped, the gradient stays.
    "cispo": Recipe("group", "clipped_weight", "token"),
    # arXiv:2402.14740: REINFORCE on whole completions against the mean of the others; KL in the reward.
    "rloo": Recipe("leave_one_out", "reinforce", "whole"),
    # arXiv:2501.03262: no groups; token-wise returns (KL in the reward) normalised over the batch.
    "reinforce_pp": Recipe("batch", "token_clip", "token"),
    # arXiv:1707.06347: generalised advantages against a value head.
    "ppo": Recipe("generalised", "token_clip", "token"),
}


class PolicyGradient:
    """The algorithms of RECIPES: sum over tokens of weight * (importance * surrogate + coefficient * KL).

    The surrogate compares the policy with the one at the start of the step ("old"), as the learner computes it; with one
    optimizer step a batch that is the policy itself, detached. Deviations from the papers: each token is multiplied by an
    importance weight old / behavior (surrogates.importance), because the engine that sampled is not exactly the learner;
    and completions without a reward, or masked because they were cut off, count neither in means nor in weights (TRL
    counts them in the number of completions).
    """

    def __init__(self, settings: AlgorithmSettings, *, max_tokens: int, term_weights: Mapping[str, float]) -> None:
        self.settings = s = settings
        self._recipe = RECIPES[s.name]
        self._max_tokens = max_tokens
        self._term_weights = dict(term_weights)
        self._weights = aggregation.by_name(s.token_weights or self._recipe.weights, max_tokens=max_tokens)
        self.kl_coefficient = s.kl_coefficient
        self.needs_reference = s.kl_coefficient != 0 and s.kl_in == "loss"
        self.surveys_reference = s.kl_coefficient != 0 and s.kl_in == "reward"
        self.has_critic = self._recipe.advantage == "generalised"

    def prepare(self, batch: Scored, survey: Survey | None) -> Prepared:
        s, rewards_N = self.settings, batch.rewards_N
        used_N = rewards_N.isfinite()
        if s.mask_truncated:
            used_N = used_N & ~batch.truncated_N
        if s.flat_groups != "keep":
            used_N = used_N & ~advantages.flat_groups(rewards_N, batch.groups_N)
        if s.overlong_buffer:
            buffer = round(s.overlong_buffer * self._max_tokens)
            rewards_N = rewards_N + advantages.overlong_penalty(
                batch.lengths_N, max_tokens=self._max_tokens, buffer=buffer
            )
        penalty_A = None
        if self.surveys_reference:
            assert survey is not None and survey.reference_logprobs_A is not None
            estimate = kl.ESTIMATORS[s.kl_estimator](survey.old_logprobs_A, survey.reference_logprobs_A)
            penalty_A = self.kl_coefficient * estimate.double()
        advantages_A, returns_A = self._advantages(replace(batch, rewards_N=rewards_N), used_N, penalty_A, survey)
        advantages_A = torch.where(batch.per_token(used_N), advantages_A, 0.0)
        moves_N = used_N
        if not (self.needs_reference or s.entropy_coefficient or self.has_critic):
            # A completion without advantage moves nothing.
            moves_N = used_N & (batch.sums(advantages_A.abs()) > 0)
        return Prepared([(i,) for i in moves_N.nonzero()[:, 0].tolist()], used_N, advantages_A, returns_A)

    def _advantages(
        self, batch: Scored, used_N: torch.Tensor, penalty_A: torch.Tensor | None, survey: Survey | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of each token the advantage and, with a critic, the return. `penalty_A` is taken off the rewards."""
        kind, s = self._recipe.advantage, self.settings
        rewards_N, groups_N = batch.rewards_N, batch.groups_N
        if kind in ("batch", "generalised"):
            # Token-wise: the penalty where it arises, the reward at the end.
            rewards_A = torch.zeros(int(batch.lengths_N.sum()), dtype=torch.float64)
            if penalty_A is not None:
                rewards_A -= penalty_A
            rewards_A[batch.lengths_N.cumsum(0) - 1] += rewards_N.nan_to_num(0.0)
            used_A = batch.per_token(used_N)
            if kind == "batch":
                to_go_A = advantages.reward_to_go(rewards_A, batch.lengths_N)
                return advantages.batch_normalised(to_go_A, used_A), None
            assert survey is not None and survey.values_A is not None
            values_A = survey.values_A.double()
            found_A = advantages.generalised(rewards_A, values_A, batch.lengths_N, gamma=s.gamma, decay=s.gae_lambda)
            return advantages.batch_normalised(found_A, used_A), found_A + values_A
        if penalty_A is not None:
            rewards_N = rewards_N - batch.sums(penalty_A)
        if s.normalise_terms:
            found_N = advantages.terms_normalised(dict(batch.terms), self._term_weights, groups_N)
        elif kind == "leave_one_out" and s.reward_scale is None:
            found_N = advantages.leave_one_out(rewards_N, groups_N)
        else:
            scale = s.reward_scale or ("group" if kind == "group" else "none")
            found_N = advantages.group_relative(rewards_N, groups_N, scale=scale)
        return batch.per_token(found_N), None

    def weights(self, batch: Scored, used_N: torch.Tensor) -> torch.Tensor:
        return self._weights(batch.lengths_N, used_N)

    def loss(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        s = self.settings
        old_logprobs_T = terms.old(policy_logprobs_T)
        loss_T = self._surrogate(terms, policy_logprobs_T, old_logprobs_T)
        if s.importance_cap is not None:
            loss_T = loss_T * surrogates.importance(
                old_logprobs_T, terms.behavior_logprobs_T, terms.rows_T,
                cap=s.importance_cap, level=s.importance_level, mode=s.importance_mode,
            )  # fmt: skip
        if self.needs_reference and terms.reference_logprobs_T is not None:
            estimate = kl.ESTIMATORS[s.kl_estimator]
            loss_T = loss_T + self.kl_coefficient * estimate(policy_logprobs_T, terms.reference_logprobs_T)
        return (loss_T * terms.weights_T).sum()

    def _surrogate(self, terms: TokenTerms, policy_T: torch.Tensor, old_T: torch.Tensor) -> torch.Tensor:
        s, advantages_T = self.settings, terms.advantages_T
        match self._recipe.surrogate:
            case "sequence_clip":
                return surrogates.sequence_clip(
                    policy_T, old_T, advantages_T, terms.rows_T, low=s.clip_low, high=s.clip_high, most=s.clip_most
                )
            case "clipped_weight":
                return surrogates.clipped_weight(policy_T, old_T, advantages_T, low=s.clip_low, high=s.clip_high)
            case "reinforce":
                return surrogates.reinforce(policy_T, advantages_T)
        return surrogates.token_clip(policy_T, old_T, advantages_T, low=s.clip_low, high=s.clip_high, most=s.clip_most)

    def clipped(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        s = self.settings
        if self._recipe.surrogate == "reinforce":
            return _none(policy_logprobs_T)
        difference_T = policy_logprobs_T - terms.old(policy_logprobs_T)
        if self._recipe.surrogate == "sequence_clip":
            difference_T = surrogates.mean_of_rows(difference_T, terms.rows_T)
        return surrogates.is_clipped(
            surrogates.ratio(difference_T), terms.advantages_T, low=s.clip_low, high=s.clip_high
        )

    def over_cap(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        s = self.settings
        if s.importance_cap is None:
            return _none(policy_logprobs_T)
        weight_T = surrogates.importance(
            terms.old(policy_logprobs_T), terms.behavior_logprobs_T, terms.rows_T, cap=float("inf"), level=s.importance_level
        )  # fmt: skip
        return weight_T > s.importance_cap


class OnlineDPO:
    """Online DPO (arXiv:2402.04792): of each group the best completion against the worst, by preferences.LOSSES.

    The reference is the model without the adapter. A group without two different rewards is a tie and has no pair. Weights
    are 1 / pairs; nothing is clipped, and no importance weight corrects for the engine, because the loss is not an
    expectation under it.
    """

    needs_reference = True
    surveys_reference = False
    has_critic = False

    def __init__(self, settings: AlgorithmSettings, *, max_tokens: int, term_weights: Mapping[str, float]) -> None:
        self.settings = settings
        self.kl_coefficient = 0.0

    def prepare(self, batch: Scored, survey: Survey | None) -> Prepared:
        rewards_N = batch.rewards_N
        if self.settings.mask_truncated:
            rewards_N = rewards_N.masked_fill(batch.truncated_N, float("nan"))
        pairs, ties = preferences.best_and_worst(rewards_N, batch.groups_N)
        signs_N = torch.zeros_like(rewards_N)
        for best, worst in pairs:
            signs_N[best], signs_N[worst] = 1.0, -1.0
        return Prepared(pairs, signs_N != 0, batch.per_token(signs_N), pairs=len(pairs), ties=ties)

    def weights(self, batch: Scored, used_N: torch.Tensor) -> torch.Tensor:
        used = used_N.to(torch.float32)
        return used / (used.sum() / 2).clamp_min(1)

    def loss(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        assert terms.reference_logprobs_T is not None
        # The sign of a token's advantage says whether it is of a chosen or a rejected completion, which follow in turn.
        signed_T = terms.advantages_T * (policy_logprobs_T - terms.reference_logprobs_T)
        ordinals_T = terms.rows_T.unique_consecutive(return_inverse=True)[1]
        pairs_T = ordinals_T // 2
        margins_P = segment_sums(signed_T, pairs_T)
        first_P = torch.cat([pairs_T.new_ones(1), pairs_T.diff()]).nonzero()[:, 0]
        losses_P = preferences.LOSSES[self.settings.preference_loss](margins_P, beta=self.settings.beta)
        return (losses_P * terms.weights_T[first_P]).sum()

    def clipped(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        return _none(policy_logprobs_T)

    def over_cap(self, terms: TokenTerms, policy_logprobs_T: torch.Tensor) -> torch.Tensor:
        return _none(policy_logprobs_T)


def _none(values_T: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(values_T, dtype=torch.bool)


OBJECTIVES: dict[str, type[Objective]] = {**dict.fromkeys(RECIPES, PolicyGradient), "online_dpo": OnlineDPO}
