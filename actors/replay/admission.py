"""Which scored groups may be trained. Knows scores; knows neither files nor the learner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.types import Group
from rewards.variance import is_zero_variance


@dataclass(frozen=True)
class Admission:
    """What became of a scored group: `accepted` or not, and whether because its rewards have `zero_variance`.

    `solved`: all its rewards are the largest possible one. `unscorable` counts those of its `samples` that have no
    reward, and `error` is the reason of one of them.
    """

    ordinal: int
    accepted: bool
    samples: int
    unscorable: int
    error: str | None = None
    zero_variance: bool = False
    solved: bool = False


def is_solved(rewards: Sequence[float | None], max_score: float | None) -> bool:
    """Whether all rewards of a group are the largest possible one, as far as that is known."""
    return max_score is not None and all(reward is not None and reward >= max_score - 1e-9 for reward in rewards)


class AdmissionPolicy:
    """Accepts groups with at least two scored samples and `min_scored_fraction` of them.

    In each step, up to `max_zero_variance` groups are refused because their rewards are equal (DAPO's dynamic
    sampling, arXiv:2503.14476); other prompts take their place. `max_scores` are the largest rewards by source.
    """

    def __init__(
        self,
        *,
        min_scored_fraction: float,
        max_zero_variance: int,
        max_scores: Mapping[str, float | None] | None = None,
    ) -> None:
        self._max_scores = max_scores or {}
        self._min_scored_fraction = min_scored_fraction
        self._max_zero_variance = max_zero_variance
        self._zero_variance = 0

    def decide(self, group: Group) -> Admission:
        rewards = [score.reward for score in group.scores if score.reward is not None]
        ordinal, samples = group.prompt.ordinal, len(group.scores)
        unscorable = samples - len(rewards)
        error = next((score.error for score in group.scores if score.error), None)
        if len(rewards) < max(2, math.ceil(self._min_scored_fraction * samples)):
            return Admission(ordinal, False, samples, unscorable, error)
        if self._zero_variance < self._max_zero_variance and is_zero_variance(rewards):
            self._zero_variance += 1
            solved = is_solved([s.reward for s in group.scores], self._max_scores.get(group.prompt.task))
            return Admission(ordinal, False, samples, unscorable, error, zero_variance=True, solved=solved)
        return Admission(ordinal, True, samples, unscorable, error)

    def start_step(self) -> None:
        """Count anew."""
        self._zero_variance = 0
