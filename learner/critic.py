"""Critic: what reward a completion that has come this far can expect, for PPO.

A linear head on the policy's last hidden states. It reads them and does not move them: the adapter is the policy's alone, so
that a critic that errs cannot harm it. Knows tensors; knows neither models nor rewards.
"""

import torch

from conf.schema import AlgorithmSettings
from learner.surrogates import value_loss


class Critic:
    """`hidden` is the width of the states, which are scaled to a norm of 1, so that one learning rate fits all models. It
    starts at 0 everywhere."""

    def __init__(self, hidden: int, settings: AlgorithmSettings, *, device: torch.device | str) -> None:
        self.flat = torch.nn.Parameter(torch.zeros(hidden + 1, dtype=torch.float32, device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = torch.optim.AdamW([self.flat], lr=settings.value_learning_rate, weight_decay=0.0)
        self._clip = settings.value_clip

    def values(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Float32 [T]."""
        features_TH = torch.nn.functional.normalize(hidden_TH.detach().float(), dim=1)
        return features_TH @ self.flat[:-1] + self.flat[-1]

    def loss(
        self, hidden_TH: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, weights_T: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of surrogates.value_loss, whose gradient goes to the head alone."""
        losses_T = value_loss(self.values(hidden_TH), old_values_T, returns_T, clip=self._clip)
        return (losses_T * weights_T).sum()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments, by name."""
        moments = self.optimizer.state[self.flat]
        return {"critic": self.flat.detach().clone(), **{f"critic_{name}": x for name, x in moments.items()}}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        with torch.no_grad():
            self.flat.copy_(tensors["critic"])
        moments = {name.removeprefix("critic_"): x for name, x in tensors.items() if name.startswith("critic_")}
        if moments:
            self.optimizer.state[self.flat] = moments
