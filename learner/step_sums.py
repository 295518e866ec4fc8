"""What a learner adds up over the micro-batches of one optimizer step, and over its ranks. Knows tensors."""

from collections.abc import Sequence

import torch

from learner.algorithms.base import Algorithm, LossInputs
from learner.losses import kl
from learner.metrics import StepStats
from learner.minibatches import MicroBatch
from learner.parallel.data_parallel import DataParallel

# Sums over tokens, but for the two losses, which are sums already, and the counts.
NAMES = (
    "loss",
    "value_loss",
    "logprob_gap",
    "capped_share",
    "clipped_share",
    "entropy",
    "reference_kl",
    "tokens",
    "rows",
    "stream_tokens",
)


class StepSums:
    """Float64 sums on `device`, by NAMES, and the largest difference of log-probabilities.

    `has_clip`: the policy may have moved since the batch began.
    """

    def __init__(self, algorithm: Algorithm, *, has_clip: bool, device: torch.device) -> None:
        self._algorithm = algorithm
        self._has_clip = has_clip
        self._sums = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        self._largest_gap = torch.zeros((), dtype=torch.float64, device=device)

    def __getitem__(self, name: str) -> float:
        return float(self._sums[NAMES.index(name)])

    def add(
        self,
        batch: MicroBatch,
        inputs: LossInputs,
        *,
        loss: torch.Tensor,
        entropy_T: torch.Tensor,
        value_loss: torch.Tensor | None,
    ) -> None:
        """Add a micro-batch."""
        gap_T = (inputs.old_logprobs_T - batch.behavior_logprobs_T).abs()
        values = {
            "loss": loss,
            "logprob_gap": gap_T.sum(),
            "capped_share": self._algorithm.over_cap(inputs).sum(),
            "entropy": entropy_T.sum(),
            "tokens": len(gap_T),
            "rows": batch.rows,
            "stream_tokens": len(batch.input_ids_S),
        }
        if self._has_clip:
            values["clipped_share"] = self._algorithm.clipped(inputs).sum()
        if inputs.reference_logprobs_T is not None:
            values["reference_kl"] = kl.k3(inputs.policy_logprobs_T, inputs.reference_logprobs_T).sum()
        if value_loss is not None:
            values["value_loss"] = value_loss
        for name, value in values.items():
            self._sums[NAMES.index(name)] += value
        self._largest_gap = torch.maximum(self._largest_gap, gap_T.max())

    def all_reduce(self, data_parallel: DataParallel) -> None:
        """Replace the sums by those of all ranks."""
        data_parallel.all_reduce(self._sums)
        data_parallel.maximum(self._largest_gap)

    @staticmethod
    def write(stats: StepStats, steps: Sequence["StepSums"]) -> None:
        """Write the means over a batch's optimizer steps, and the counts, into `stats`."""
        totals = dict(zip(NAMES, torch.stack([step._sums for step in steps]).sum(0).tolist(), strict=True))
        tokens, count = max(totals["tokens"], 1.0), len(steps)
        stats.optimizer_steps = count
        stats.loss, stats.value_loss, stats.grad_norm = (
            totals["loss"] / count,
            totals["value_loss"] / count,
            stats.grad_norm / count,
        )
        stats.logprob_gap = totals["logprob_gap"] / tokens
        stats.logprob_gap_max = max(float(step._largest_gap) for step in steps)
        stats.capped_share = totals["capped_share"] / tokens
        stats.entropy = totals["entropy"] / tokens
        stats.reference_kl = totals["reference_kl"] / tokens
        if count > 1:
            stats.clipped_share = totals["clipped_share"] / tokens
        stats.trained_completions, stats.trained_tokens = int(totals["rows"]), int(totals["tokens"])
        stats.stream_tokens = int(totals["stream_tokens"])
