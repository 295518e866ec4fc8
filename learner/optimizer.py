"""The optimizer of one flat buffer, and its learning rate over a run."""

import math
from typing import Any

import torch

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


def adamw(flat: torch.nn.Parameter, settings: LearnerSettings) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with moments of one byte."""
    arguments: Any = {
        "lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.weight_decay,
    }  # fmt: skip
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit([flat], **arguments)
    return torch.optim.AdamW([flat], fused=True, **arguments)
