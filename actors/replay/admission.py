"""Which scored groups may be trained. Knows scores; knows neither files nor the learner."""

import math
from dataclasses import dataclass

from actors.types import Group
from rewards.variance import is_zero_variance


@dataclass(frozen=True)
class Admission:
    """What became of a scored group: `accepted` or not, and whether because its rewards have `zero_variance`.

    `unscorable` counts those of its `samples` that have no reward, and `error` is the reason of one of them.
    """

    ordinal: int
    accepted: bool
    samples: int
    unscorable: int
    error: str | None = None
    zero_variance: bool = False


class AdmissionPolicy:
    """Accepts groups with at least two scored samples and `min_scored_fraction` of them.

    In each step, up to `max_zero_variance` groups are refused because their rewards are equal (DAPO's dynamic
    sampling, arXiv:2503.14476); other prompts take their place.
    """

    def __init__(self, *, min_scored_fraction: float, max_zero_variance: int) -> None:
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
            return Admission(ordinal, False, samples, unscorable, error, zero_variance=True)
        return Admission(ordinal, True, samples, unscorable, error)

    def start_step(self) -> None:
        """Count anew."""
        self._zero_variance = 0
