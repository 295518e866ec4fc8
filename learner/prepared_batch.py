"""A batch with its advantages, ready for the optimizer steps. Knows the algorithm; knows no model."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from conf.schema import AlgorithmSettings
from learner.algorithms.base import Advantages, Algorithm, OldLogprobs
from learner.batch import Rollouts
from learner.minibatches import Unit, optimizer_steps


@dataclass(frozen=True)
class PreparedBatch:
    """What a step trains on. `columns` have a number for each sampled token of the batch, float32 [A], on the
    device.
    """

    rollouts: Rollouts
    advantages: Advantages
    columns: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls, rollouts: Rollouts, algorithm: Algorithm, old: OldLogprobs | None, *, device: torch.device
    ) -> "PreparedBatch":
        advantages = algorithm.prepare(rollouts.rewarded, old)
        columns = {"advantages": advantages.advantages_A, "returns": advantages.returns_A}
        if old is not None:
            columns |= {"old": old.old_logprobs_A, "reference": old.reference_logprobs_A, "values": old.values_A}
        on_device = {name: x.to(device, torch.float32) for name, x in columns.items() if x is not None}
        return cls(rollouts, advantages, on_device)

    def optimizer_steps(self, settings: AlgorithmSettings) -> Iterator[tuple[list[Unit], torch.Tensor]]:
        """The units of each optimizer step, and the trajectories that its weights count."""
        units, groups_N = self.advantages.pack_units, self.rollouts.rewarded.groups_N
        for part, part_N in optimizer_steps(units, groups_N, epochs=settings.epochs, minibatches=settings.minibatches):
            yield part, self.advantages.counted_N & part_N

    def explained_variance(self) -> float:
        """Of the returns of the counted tokens, by the values before the step."""
        returns_A, values_A = self.columns["returns"], self.columns["values"]
        counted_A = self.rollouts.rewarded.per_token(self.advantages.counted_N).to(returns_A.device)
        returns, values = returns_A[counted_A], values_A[counted_A]
        return float(1 - (returns - values).var() / returns.var().clamp_min(1e-12))
