"""The learning rate over a run. A pure function."""

import math

from conf.schema import LearnerSettings


def learning_rate(settings: LearnerSettings, version: int, steps: int) -> float:
    """What step `version + 1` of `steps` learns at: a line from 0 over the warm-up, then what `settings.schedule` says, which
    reaches learning_rate * final_rate with the last step."""
    s = settings
    if version < s.warmup_steps:
        return s.learning_rate * (version + 1) / s.warmup_steps
    done = min(1.0, (version + 1 - s.warmup_steps) / max(1, steps - s.warmup_steps))
    fall = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[s.schedule]
    return s.learning_rate * (1 - (1 - s.final_rate) * fall)
