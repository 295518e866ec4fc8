"""Critic: the value of a partial completion, for PPO.

A linear head on the policy's last hidden states. No gradient flows from it into the adapter, so that a wrong critic
cannot damage the policy. Knows tensors; knows neither models nor rewards. Suffixes: T completion tokens, H hidden.
"""

from collections.abc import Mapping

import torch

from learner.losses.surrogates import value_loss


class Critic:
    """A linear value head on states of width `hidden_size`, with its own AdamW optimizer. Its weights start at 0.

    States are scaled to norm 1, so that one `learning_rate` fits all models. `value_clip` is the clip of
    surrogates.value_loss.
    """

    def __init__(
        self, hidden_size: int, *, learning_rate: float, value_clip: float | None, device: torch.device | str
    ) -> None:
        self.flat = torch.nn.Parameter(torch.zeros(hidden_size + 1, dtype=torch.float32, device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = torch.optim.AdamW([self.flat], lr=learning_rate, weight_decay=0.0)
        self._value_clip = value_clip

    def values(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Values of the states that predict each token: float32 [T]."""
        features_TH = torch.nn.functional.normalize(hidden_TH.detach().float(), dim=1)
        return features_TH @ self.flat[:-1] + self.flat[-1]

    def loss(
        self, hidden_TH: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, weights_T: torch.Tensor
    ) -> torch.Tensor:
        """The sum of surrogates.value_loss weighted by `weights_T`: a scalar with a gradient for the head alone."""
        losses_T = value_loss(self.values(hidden_TH), old_values_T, returns_T, clip=self._value_clip)
        return (losses_T * weights_T).sum()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights ("critic"), and step count and moments ("critic_...")."""
        moments = self.optimizer.state[self.flat]
        return {"critic": self.flat.detach().clone(), **{f"critic_{name}": x for name, x in moments.items()}}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` returned, from any device. Other names are ignored."""
        with torch.no_grad():
            self.flat.copy_(tensors["critic"])
        self.optimizer.state[self.flat] = {
            name.removeprefix("critic_"): x.to(self.flat.device)
            for name, x in tensors.items()
            if name.startswith("critic_")
        }
