"""Learner: one optimizer step from one Arrow table.

Knows the policy, the objective and the optimizer; knows neither where the rows came from nor where the adapter goes.
"""

import time
import warnings
from typing import Any

import pyarrow as pa
import torch

from actors.types import Adapter
from conf.errors import UsageError
from conf.schema import LearnerSettings
from learner import kl
from learner.batch import MicroBatch, Rollouts, costs, micro_batches
from learner.memory import WITHOUT_GPU
from learner.objectives import Objective, Prepared, TokenTerms
from learner.policy import Policy
from learner.ranks import Ranks
from learner.stats import StepStats

# What a rank adds up over its micro-batches.
SUMS = (
    "loss",
    "tokens",
    "mismatch",
    "mismatch_max",
    "capped_share",
    "entropy",
    "reference_kl",
    "rows",
    "stream_tokens",
)


class OutOfMemory(UsageError):
    """The learner's step does not fit on the card; the message says what to change."""


# float16 gradients of activations vanish under 6e-8: they are computed times this, which falls where it overflows.
FIRST_LOSS_SCALE = 2.0**16


class Learner:
    """Trains `policy` by `objective`; `version` counts the optimizer steps taken. One of `ranks`, which must all take each
    step with the same rows."""

    def __init__(self, policy: Policy, objective: Objective, settings: LearnerSettings) -> None:
        self.version = 0
        self.ranks = Ranks()
        self._policy = policy
        self._objective = objective
        self._settings = settings
        self._micro_batch_tokens = settings.micro_batch_tokens or WITHOUT_GPU["micro_batch_tokens"]
        self._has_halved = False
        self._loss_scale = FIRST_LOSS_SCALE if policy.dtype == torch.float16 else 1.0
        self._optimizer = _optimizer(policy.lora.flat, settings)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    @property
    def policy(self) -> Policy:
        return self._policy

    def adapter(self, into: torch.Tensor | None = None) -> Adapter:
        """The weights as they are now, as version `version`, copied `into` a buffer where one is given."""
        return self._policy.lora.export(self.version, into)

    def load(self, adapter: Adapter) -> None:
        """Go on from `adapter` and its version."""
        self._policy.lora.load(adapter)
        self.version = adapter.version

    def step(self, table: pa.Table) -> StepStats:
        """One optimizer step on every row of `table`.

        Raises FloatingPointError if the gradient is not finite, OutOfMemory if half the micro-batch is still too much;
        nothing is changed then.
        """
        start = time.monotonic()
        flat, s = self._policy.lora.flat, self._settings
        stats = self._gradient(table)
        stats.grad_norm = float(torch.nn.utils.clip_grad_norm_([flat], s.max_grad_norm))
        if not stats.grad_norm < float("inf"):
            raise FloatingPointError(
                f"the gradient norm is {stats.grad_norm} at version {self.version}; nothing was changed"
            )
        stats.learning_rate = s.learning_rate * min(1.0, (self.version + 1) / max(1, s.warmup_steps))
        self._optimizer.param_groups[0]["lr"] = stats.learning_rate
        self._optimizer.step()
        self.version += 1
        stats.seconds = time.monotonic() - start
        return stats

    def _gradient(self, table: pa.Table) -> StepStats:
        """The gradient of the loss on `table`, in the flat gradient: once more with half the micro-batch where memory
        runs out, and with a smaller loss scale where float16 overflows."""
        flat = self._policy.lora.flat
        assert flat.grad is not None
        while True:
            flat.grad.zero_()
            try:
                sums = self.accumulate(table)
            except torch.OutOfMemoryError as error:
                self._halve(error)
            else:
                flat.grad.div_(self._loss_scale)
                if self._loss_scale == 1.0 or bool(flat.grad.isfinite().all()):
                    break
                self._loss_scale = max(1.0, self._loss_scale / 16)
            if flat.is_cuda:
                torch.cuda.empty_cache()
        self.ranks.add_up(flat.grad)
        return self._stats(sums)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self._has_halved:
            raise OutOfMemory(
                f"out of memory with {self._micro_batch_tokens} tokens a micro-batch; set hardware.vram_gib to what this "
                "process may take, learner.offload_activations=true, or a smaller sampling.max_tokens"
            ) from error
        self._has_halved = True
        self._micro_batch_tokens = max(1, self._micro_batch_tokens // 2)
        warnings.warn(
            f"out of memory: this step again, and all from now on, with {self._micro_batch_tokens} tokens a micro-batch",
            stacklevel=4,
        )

    def accumulate(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """Add the gradient of the loss on this rank's rows of `table`, times the loss scale, to the flat gradient, micro-batch
        by micro-batch; returns sums over the trained tokens, their largest mismatch, and counts."""
        rollouts = Rollouts.from_table(table)
        prepared = self._objective.prepare(rollouts.rewards_N, rollouts.groups_N, rollouts.lengths_N)
        # A completion without advantage moves nothing, unless the reference pulls on it.
        moves_N = prepared.token_weights_N > 0
        if not self._objective.needs_reference:
            moves_N &= prepared.advantages_N != 0
        every_row = moves_N.nonzero()[:, 0].tolist()
        rows = every_row[self.ranks.share([cost for _, cost in costs(rollouts, every_row)])]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self._policy.device) for name in SUMS}
        sums["rows"] += len(rows)
        for batch in micro_batches(rollouts, rows, max_tokens=self._micro_batch_tokens, device=self._policy.device):
            sums["stream_tokens"] += len(batch.input_ids_S)
            for name, value in self._backward(batch, prepared).items():
                if name == "mismatch_max":
                    sums[name] = torch.maximum(sums[name], value)
                else:
                    sums[name] += value
        return sums

    def _stats(self, sums: dict[str, torch.Tensor]) -> StepStats:
        """What all ranks did together."""
        added, largest = torch.stack([sums[name] for name in SUMS]), sums["mismatch_max"].clone()
        self.ranks.add_up(added)
        self.ranks.maximum(largest)
        total = dict(zip(SUMS, added.tolist(), strict=True))
        tokens = max(total["tokens"], 1.0)
        return StepStats(
            loss=total["loss"], mismatch=total["mismatch"] / tokens, mismatch_max=largest.item(),
            capped_share=total["capped_share"] / tokens, entropy=total["entropy"] / tokens,
            reference_kl=total["reference_kl"] / tokens if self._objective.needs_reference else None,
            trained_completions=int(total["rows"]), trained_tokens=int(total["tokens"]),
            stream_tokens=int(total["stream_tokens"]),
        )  # fmt: skip

    def _backward(self, batch: MicroBatch, prepared: Prepared) -> dict[str, torch.Tensor]:
        rows = batch.row_T.cpu()
        terms = TokenTerms(
            advantages_T=prepared.advantages_N[rows].to(batch.targets_T.device, torch.float32),
            weights_T=prepared.token_weights_N[rows].to(batch.targets_T.device, torch.float32),
            behavior_logprobs_T=batch.behavior_logprobs_T,
        )
        reference_logprobs_T = None
        if self._objective.needs_reference:
            with self._policy.reference():
                reference_logprobs_T, _ = self._policy.logprobs(batch)
        policy_logprobs_T, entropy_T = self._policy.logprobs(batch)
        loss = self._objective.loss(terms, policy_logprobs_T, reference_logprobs_T)
        (loss * self._loss_scale).backward()
        policy_logprobs_T = policy_logprobs_T.detach()
        mismatch_T = (policy_logprobs_T - batch.behavior_logprobs_T).abs()
        sums = {
            "loss": loss.detach(),
            "tokens": loss.new_tensor(len(batch.targets_T)),
            "mismatch": mismatch_T.sum(),
            "mismatch_max": mismatch_T.max(),
            "capped_share": self._objective.clipped(terms, policy_logprobs_T).sum(),
            "entropy": entropy_T.sum(),
        }
        if reference_logprobs_T is not None:
            sums["reference_kl"] = kl.k3(policy_logprobs_T, reference_logprobs_T).sum()
        return sums


def _optimizer(flat: torch.nn.Parameter, settings: LearnerSettings) -> torch.optim.Optimizer:
    arguments: Any = {
        "lr": settings.learning_rate, "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.weight_decay,
    }  # fmt: skip
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit([flat], **arguments)
    return torch.optim.AdamW([flat], fused=True, **arguments)
