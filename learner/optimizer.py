"""The optimizer of one flat buffer of weights, and its learning rate over a run.

Knows tensors; knows neither models, losses nor files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from conf.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """Learning rate over a run of `steps` steps: a linear warm-up, then `kind` (constant, linear or cosine).

    Linear and cosine schedules reach `min_lr_ratio` times the base rate in the last step.
    """

    kind: str
    warmup_steps: int
    min_lr_ratio: float
    steps: int

    def learning_rate(self, base: float, version: int) -> float:
        """The rate of the step that turns adapter `version` into `version + 1`."""
        if version < self.warmup_steps:
            return base * (version + 1) / self.warmup_steps
        progress = min(1.0, (version + 1 - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        decay = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.kind]
        return base * (1 - (1 - self.min_lr_ratio) * decay)


class Optimizer:
    """AdamW on `flat`, whose gradient is `flat.grad`. `kind` is "adamw", or "adamw8bit" (bitsandbytes, 8-bit moments).

    `learning_rate` is the base rate of `schedule`; `clip` clips the gradient to `max_grad_norm`. Raises UsageError for
    an unknown `kind`.
    """

    def __init__(
        self,
        flat: torch.nn.Parameter,
        *,
        kind: str,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        schedule: Schedule,
    ) -> None:
        self._flat = flat
        self._learning_rate = learning_rate
        self._max_grad_norm = max_grad_norm
        self._schedule = schedule
        self.kind = kind
        self.optimizer = _adamw(flat, kind=kind, learning_rate=learning_rate, betas=betas, weight_decay=weight_decay)

    def set_version(self, version: int) -> float:
        """Set the learning rate of the step that follows adapter `version`, and return it."""
        rate = self._schedule.learning_rate(self._learning_rate, version)
        self.optimizer.param_groups[0]["lr"] = rate
        return rate

    def clip(self) -> float:
        """Clip the gradient; returns its norm before clipping (inf or NaN if the gradient is not finite)."""
        return float(torch.nn.utils.clip_grad_norm_([self._flat], self._max_grad_norm))

    def step(self) -> None:
        """Update the weights from the gradient."""
        self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Step count and moments by name, not copied. Empty before the first step."""
        # bitsandbytes counts its steps in a plain int.
        values = self.optimizer.state[self._flat]
        return {name: x if isinstance(x, torch.Tensor) else torch.tensor(x) for name, x in values.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned, from any device. Raises UsageError if it is another optimizer's."""
        stored = "adamw" if "exp_avg" in tensors else "adamw8bit"
        if stored != self.kind:
            raise UsageError(f"this checkpoint's moments are those of {stored}: set learner.optimizer={stored}")
        self.optimizer.state[self._flat] = {
            name: int(x) if x.dtype == torch.int64 else x.to(self._flat.device) for name, x in tensors.items()
        }


def _adamw(
    flat: torch.nn.Parameter, *, kind: str, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW([flat], lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit([flat], lr=learning_rate, betas=betas, weight_decay=weight_decay)
    raise UsageError(f"learner.optimizer={kind}: choose adamw or adamw8bit")
