"""Learner: one batch of rollouts from an Arrow table becomes one new version of the adapter.

Knows the policy, the objective and the optimizer; knows neither where the rows came from nor where the adapter goes.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import torch

from actors.engine import Diverged
from actors.types import Adapter
from conf.errors import UsageError
from conf.schema import LearnerSettings
from learner import kl
from learner.batch import MicroBatch, Rollouts, costs, micro_batches
from learner.critic import Critic
from learner.memory import WITHOUT_GPU
from learner.objectives import Objective
from learner.optimizer import adamw, learning_rate
from learner.policy import Policy
from learner.ranks import Ranks
from learner.stats import StepStats
from learner.survey import survey
from learner.terms import Prepared, TokenTerms

R = TypeVar("R")
# What a rank adds up over its micro-batches: of the optimizer steps, of the tokens (all but the first two are sums over them),
# and counts.
SUMS = (
    "loss", "value_loss", "mismatch", "capped_share", "clipped_share", "entropy", "reference_kl", "tokens", "rows",
    "stream_tokens", "mismatch_max",
)  # fmt: skip


class OutOfMemory(UsageError):
    """The learner's step does not fit on the card; the message says what to change."""


# float16 gradients of activations vanish under 6e-8: they are computed times this, which falls where it overflows.
FIRST_LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class _Batch:
    """What a step trains on. `columns` has a number for each completion token of the batch, float32 [A] where the policy is:
    advantages, and as far as they are known old, reference, values and returns."""

    rollouts: Rollouts
    prepared: Prepared
    columns: dict[str, torch.Tensor]


class Learner:
    """Trains `policy` by `objective`; `version` counts the batches trained, of `steps` in the run. One of `ranks`, which must
    all take each step with the same rows."""

    def __init__(self, policy: Policy, objective: Objective, settings: LearnerSettings, *, steps: int = 0) -> None:
        self.version = 0
        self.ranks = Ranks()
        self.policy = policy
        self.objective = objective
        self._settings = settings
        self._steps = steps
        self._micro_batch_tokens = settings.micro_batch_tokens or WITHOUT_GPU["micro_batch_tokens"]
        self._has_halved = False
        self._loss_scale = FIRST_LOSS_SCALE if policy.dtype == torch.float16 else 1.0
        self.optimizer = adamw(policy.lora.flat, settings)
        self.critic = (
            Critic(policy.hidden_size, objective.settings, device=policy.device) if objective.has_critic else None
        )

    def adapter(self, into: torch.Tensor | None = None) -> Adapter:
        """The weights as they are now, as version `version`, copied `into` a buffer where one is given."""
        return self.policy.lora.export(self.version, into)

    def load(self, adapter: Adapter) -> None:
        """Go on from `adapter` and its version."""
        self.policy.lora.load(adapter)
        self.version = adapter.version

    def step(self, table: pa.Table) -> StepStats:
        """Train on every row of `table`, in as many optimizer steps as the algorithm says.

        Raises Diverged if a gradient is not finite, OutOfMemory if half the micro-batch is still too much; that
        optimizer step changes nothing then.
        """
        start = time.monotonic()
        stats = StepStats(learning_rate=learning_rate(self._settings, self.version, self._steps))
        self.optimizer.param_groups[0]["lr"] = stats.learning_rate
        batch = self._look(table)
        sums: list[dict[str, float]] = []
        for units, used_N in self._parts(batch):
            sums.append(self._gradient(batch, units, used_N))
            stats.grad_norm += self._update()
        self._report(stats, batch, sums)
        self._adapt(stats)
        self.version += 1
        stats.seconds = time.monotonic() - start
        return stats

    # Before the first optimizer step

    def _look(self, table: pa.Table) -> _Batch:
        """Advantages, and what they need to know of the batch."""
        rollouts, found = Rollouts.from_table(table), None
        if self._surveys:
            each = [(row,) for row in range(len(rollouts.token_ids))]
            size = int(rollouts.scored.lengths_N.sum())
            found = self._patiently(
                lambda: survey(self._share(rollouts, each), size, self.policy, self.objective, self.critic, self.ranks)
            )
        prepared = self.objective.prepare(rollouts.scored, found)
        known = {"advantages": prepared.advantages_A, "returns": prepared.returns_A}
        if found is not None:
            known |= {"old": found.old_logprobs_A, "reference": found.reference_logprobs_A, "values": found.values_A}
        columns = {n: x.to(self.policy.device, torch.float32) for n, x in known.items() if x is not None}
        return _Batch(rollouts, prepared, columns)

    @property
    def _surveys(self) -> bool:
        """Whether a batch is looked at before it is trained: for what enters advantages, or for the policy as it was before
        the first of several optimizer steps."""
        return self.objective.surveys_reference or self.objective.has_critic or self._optimizer_steps > 1

    @property
    def _optimizer_steps(self) -> int:
        return self.objective.settings.epochs * self.objective.settings.minibatches

    def _parts(self, batch: _Batch) -> Iterator[tuple[list[tuple[int, ...]], torch.Tensor]]:
        """The units of each optimizer step, and which completions its weights count: the groups in as many parts as there are
        minibatches, in each epoch the same."""
        s, groups_N = self.objective.settings, batch.rollouts.scored.groups_N
        count = int(groups_N.max()) + 1
        part_N = groups_N * s.minibatches // count
        for _ in range(s.epochs):
            for part in range(s.minibatches):
                units = [tuple(unit) for unit in batch.prepared.units if int(part_N[unit[0]]) == part]
                yield units, batch.prepared.used_N & (part_N == part)

    # One optimizer step

    def accumulate(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """The gradient of the loss on this rank's rows of `table`, all in one optimizer step, times the loss scale, in the flat
        gradient; returns SUMS."""
        batch = self._look(table)
        return self._accumulate(batch, batch.prepared.units, batch.prepared.used_N)

    def _gradient(self, batch: _Batch, units: Sequence[tuple[int, ...]], used_N: torch.Tensor) -> dict[str, float]:
        """The gradient of all ranks in the flat gradient: once more with half the micro-batch where memory runs out, and with a
        smaller loss scale where float16 overflows. Returns SUMS of all ranks."""
        flat = self.policy.lora.flat
        assert flat.grad is not None
        while True:
            sums = self._patiently(lambda: self._accumulate(batch, units, used_N))
            flat.grad.div_(self._loss_scale)
            if self._loss_scale == 1.0 or bool(flat.grad.isfinite().all()):
                break
            self._loss_scale = max(1.0, self._loss_scale / 16)
        for gradient in self._gradients:
            self.ranks.add_up(gradient)
        added, largest = torch.stack([sums[name] for name in SUMS]), sums["mismatch_max"].clone()
        self.ranks.add_up(added)
        self.ranks.maximum(largest)
        return dict(zip(SUMS, added.tolist(), strict=True)) | {"mismatch_max": largest.item()}

    @property
    def _gradients(self) -> list[torch.Tensor]:
        trained = [self.policy.lora.flat, *([self.critic.flat] if self.critic else [])]
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    @property
    def _policy_moves(self) -> bool:
        """Not while the critic warms up."""
        return self.critic is None or self.version >= self.objective.settings.critic_warmup_steps

    def _update(self) -> float:
        """Take the optimizer step; returns the gradient's norm before clipping."""
        flat = self.policy.lora.flat
        norm = float(torch.nn.utils.clip_grad_norm_([flat], self._settings.max_grad_norm))
        if not norm < float("inf"):
            raise Diverged(
                f"the gradient norm is {norm} in step {self.version + 1}: the run has diverged. Go on from the last checkpoint "
                f"with a lower learner.learning_rate (now {self._settings.learning_rate:g}) or learner.max_grad_norm"
            )
        if self._policy_moves:
            self.optimizer.step()
        if self.critic is not None:
            self.critic.optimizer.step()
        return norm

    def _patiently(self, call: Callable[[], R]) -> R:
        """What `call` returns, made again with half the micro-batch where memory runs out."""
        while True:
            try:
                return call()
            except torch.OutOfMemoryError as error:
                self._halve(error)
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()

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

    def _accumulate(
        self, batch: _Batch, units: Sequence[tuple[int, ...]], used_N: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        for gradient in self._gradients:
            gradient.zero_()
        scored = batch.rollouts.scored
        weights_A = scored.per_token(self.objective.weights(scored, used_N)).to(self.policy.device, torch.float32)
        columns = batch.columns | {"weights": weights_A}
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.policy.device) for name in SUMS}
        for micro_batch in self._share(batch.rollouts, units):
            for name, value in self._backward(micro_batch, columns).items():
                if name == "mismatch_max":
                    sums[name] = torch.maximum(sums[name], value)
                else:
                    sums[name] += value
        return sums

    def _share(self, rollouts: Rollouts, units: Sequence[tuple[int, ...]]) -> Iterator[MicroBatch]:
        """This rank's units, packed."""
        mine = list(units)[self.ranks.share(costs(rollouts, units))]
        return micro_batches(rollouts, mine, max_tokens=self._micro_batch_tokens, device=self.policy.device)

    def _backward(self, batch: MicroBatch, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        o, entropy_coefficient = self.objective, self.objective.settings.entropy_coefficient
        here = {name: values_A[batch.token_T] for name, values_A in columns.items()}
        if o.needs_reference and "reference" not in here:
            with self.policy.reference():
                here["reference"] = self.policy.logprobs(batch).logprobs_T
        terms = TokenTerms(
            rows_T=batch.row_T, advantages_T=here["advantages"], weights_T=here["weights"],
            behavior_logprobs_T=batch.behavior_logprobs_T,
            old_logprobs_T=here.get("old") if self._optimizer_steps > 1 else None,
            reference_logprobs_T=here.get("reference"),
        )  # fmt: skip
        with torch.set_grad_enabled(self._policy_moves):
            policy_logprobs_T, entropy_T, hidden_TH = self.policy.logprobs(
                batch, entropy_moves=entropy_coefficient != 0, keep_hidden=o.has_critic
            )
            loss = o.loss(terms, policy_logprobs_T)
            if entropy_coefficient:
                loss = loss - entropy_coefficient * (entropy_T * terms.weights_T).sum()
        if self._policy_moves:
            (loss * self._loss_scale).backward()
        policy_logprobs_T, entropy_T = policy_logprobs_T.detach(), entropy_T.detach()
        mismatch_T = (terms.old(policy_logprobs_T) - batch.behavior_logprobs_T).abs()
        sums = {
            "loss": loss.detach(), "tokens": loss.new_tensor(len(mismatch_T)), "rows": loss.new_tensor(batch.rows),
            "stream_tokens": loss.new_tensor(len(batch.input_ids_S)),
            "mismatch": mismatch_T.sum(), "mismatch_max": mismatch_T.max(), "entropy": entropy_T.sum(),
            "capped_share": o.over_cap(terms, policy_logprobs_T).sum(),
        }  # fmt: skip
        if terms.old_logprobs_T is not None:
            sums["clipped_share"] = o.clipped(terms, policy_logprobs_T).sum()
        if "reference" in here:
            sums["reference_kl"] = kl.k3(policy_logprobs_T, here["reference"]).sum()
        if self.critic is not None:
            assert hidden_TH is not None
            value_loss = self.critic.loss(hidden_TH, here["values"], here["returns"], here["weights"])
            value_loss.backward()
            sums["value_loss"] = value_loss.detach()
        return sums

    # After the last

    def _report(self, stats: StepStats, batch: _Batch, sums: Sequence[dict[str, float]]) -> None:
        total = {name: sum(part[name] for part in sums) for name in SUMS}
        steps, tokens, prepared = len(sums), max(total["tokens"], 1.0), batch.prepared
        stats.optimizer_steps = steps
        stats.loss, stats.grad_norm = total["loss"] / steps, stats.grad_norm / steps
        for name in ("mismatch", "capped_share", "entropy"):
            setattr(stats, name, total[name] / tokens)
        stats.mismatch_max = max(part["mismatch_max"] for part in sums)
        if steps > 1:
            stats.clipped_share = total["clipped_share"] / tokens
        if self.objective.needs_reference or self.objective.surveys_reference:
            stats.reference_kl = total["reference_kl"] / tokens
            stats.kl_coefficient = self.objective.kl_coefficient
        if self.critic is not None:
            used_A = batch.rollouts.scored.per_token(prepared.used_N).to(self.policy.device)
            returns, values = (batch.columns[name][used_A] for name in ("returns", "values"))
            stats.value_loss = total["value_loss"] / steps
            stats.explained_variance = float(1 - (returns - values).var() / returns.var().clamp_min(1e-12))
        stats.pairs, stats.ties = prepared.pairs, prepared.ties
        stats.trained_completions, stats.trained_tokens = int(total["rows"]), int(total["tokens"])
        stats.stream_tokens = int(total["stream_tokens"])

    def _adapt(self, stats: StepStats) -> None:
        """Let the weight of KL follow its target."""
        target = self.objective.settings.kl_target
        if target is not None and stats.reference_kl is not None:
            coefficient = self.objective.kl_coefficient
            self.objective.kl_coefficient = kl.adapted(coefficient, measured=stats.reference_kl, target=target)
