"""Learner: one batch of rollouts from an Arrow table becomes one new version of the adapter.

Knows the policy, the algorithm and the optimizer; knows neither where rows come from nor where the adapter goes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import torch

from actors.engines.base import Diverged
from actors.types import Adapter
from learner.algorithms.base import Algorithm, LossInputs, OldLogprobs
from learner.batch import Rollouts
from learner.losses import kl
from learner.metrics import StepStats
from learner.micro_batch_limit import MicroBatchLimit
from learner.minibatches import MicroBatch, Unit, in_lockstep, micro_batches, unit_costs
from learner.model.critic import Critic
from learner.model.policy import Policy
from learner.old_logprobs import precompute_logprobs, reference_logprobs
from learner.optimizer import Optimizer
from learner.parallel.data_parallel import DataParallel
from learner.parallel.sharding import ShardedBase
from learner.prepared_batch import PreparedBatch
from learner.random_state import random_state, restore_random_state
from learner.step_sums import StepSums

# float16 gradients of activations vanish under 6e-8: they are computed times this, which falls where it overflows.
FIRST_LOSS_SCALE = 2.0**16


class Learner:
    """Trains `policy` by `algorithm`; `version` counts the batches that were trained, and names the adapter.

    With a `data_parallel` of several ranks, all of them must take each step with the same rows; with a base that is
    `sharded` over them, in lockstep.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        *,
        optimizer: Optimizer,
        micro_batch_tokens: int,
        critic: Critic | None = None,
        sharded: ShardedBase | None = None,
    ) -> None:
        self.version = 0
        self.policy = policy
        self.algorithm = algorithm
        self.optimizer = optimizer
        self.critic = critic
        self.sharded = sharded
        self.data_parallel = DataParallel()
        # [A], of the last step's batch before it; -inf for tokens that were not trained.
        self.policy_logprobs_A = torch.empty(0)
        self._limit = MicroBatchLimit(micro_batch_tokens, may_halve=sharded is None)
        self._loss_scale = FIRST_LOSS_SCALE if policy.dtype == torch.float16 else 1.0

    def adapter(self, into: torch.Tensor | None = None) -> Adapter:
        """The weights as they are now, as version `version`, copied `into` a buffer if one is given."""
        return self.policy.lora.export(self.version, into)

    def load(self, adapter: Adapter) -> None:
        """Continue from `adapter` and its version."""
        self.policy.lora.load(adapter)
        self.version = adapter.version

    def step(self, table: pa.Table) -> StepStats:
        """Train on every row of `table`, in as many optimizer steps as the algorithm says.

        Raises Diverged if a gradient is not finite, OutOfMemory if half the micro-batch is still too much; that
        optimizer step changes nothing then.
        """
        start = time.monotonic()
        stats = StepStats(learning_rate=self.optimizer.set_version(self.version))
        batch = self._prepare_batch(table)
        sums: list[StepSums] = []
        for units, counted_N in batch.optimizer_steps(self.algorithm.settings):
            sums.append(self._gradient(batch, units, counted_N))
            stats.grad_norm += self._update()
        self._report(stats, batch, sums)
        self.data_parallel.maximum(self.policy_logprobs_A)
        self.version = stats.version = self.version + 1
        stats.seconds = time.monotonic() - start
        return stats

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores beside the adapter: moments, the critic, and torch's random state."""
        tensors = self.optimizer.state()
        if self.critic is not None:
            tensors |= self.critic.state()
        return tensors | random_state(self.policy.device)

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned, from any device."""
        moments = {name: x for name, x in tensors.items() if not name.startswith(("random_", "critic"))}
        if moments:
            self.optimizer.load(moments)
        if self.critic is not None:
            self.critic.load(tensors)
        restore_random_state(tensors)

    def _prepare_batch(self, table: pa.Table) -> PreparedBatch:
        rollouts = Rollouts.from_table(table)
        old = self._limit.retry(lambda: self._old_logprobs(rollouts)) if self._needs_old_logprobs else None
        self.policy_logprobs_A = torch.full((rollouts.sampled_tokens,), float("-inf"), device=self.policy.device)
        return PreparedBatch.of(rollouts, self.algorithm, old, device=self.policy.device)

    @property
    def _needs_old_logprobs(self) -> bool:
        """Whether a pass without gradient comes first: for the advantages, or before several optimizer steps."""
        return (
            self.algorithm.reference_in_reward or self.critic is not None or self.algorithm.settings.steps_per_batch > 1
        )

    def _old_logprobs(self, rollouts: Rollouts) -> OldLogprobs:
        return precompute_logprobs(
            self._share(rollouts, [(row,) for row in range(len(rollouts.token_ids))]),
            rollouts.sampled_tokens,
            policy=self.policy,
            needs_reference=self.algorithm.reference_in_loss or self.algorithm.reference_in_reward,
            critic=self.critic,
            data_parallel=self.data_parallel,
        )

    def accumulate(self, table: pa.Table) -> StepSums:
        """Leave the gradient of the loss on this rank's rows of `table`, as one optimizer step, in the flat gradient.

        It is multiplied by the loss scale.
        """
        batch = self._prepare_batch(table)
        return self._accumulate(batch, batch.advantages.pack_units, batch.advantages.counted_N)

    def _gradient(self, batch: PreparedBatch, units: Sequence[Unit], counted_N: torch.Tensor) -> StepSums:
        """Leave the gradient of all ranks in the flat gradient.

        It is computed again with half the micro-batch if memory runs out, and with a smaller loss scale if float16
        overflows.
        """
        flat = self.policy.lora.flat
        assert flat.grad is not None
        while True:
            sums = self._limit.retry(lambda: self._accumulate(batch, units, counted_N))
            flat.grad.div_(self._loss_scale)
            if self._loss_scale == 1.0 or bool(flat.grad.isfinite().all()):
                break
            self._loss_scale = max(1.0, self._loss_scale / 16)
        for gradient in self._gradients:
            self.data_parallel.all_reduce(gradient)
        sums.all_reduce(self.data_parallel)
        return sums

    @property
    def _gradients(self) -> list[torch.Tensor]:
        trained = [self.policy.lora.flat, *([self.critic.flat] if self.critic else [])]
        return [parameter.grad for parameter in trained if parameter.grad is not None]

    @property
    def _trains_policy(self) -> bool:
        """Not while the critic warms up."""
        return self.critic is None or self.version >= self.algorithm.settings.ppo.critic_warmup_steps

    def _update(self) -> float:
        """Take the optimizer step; returns the gradient's norm before clipping."""
        norm = self.optimizer.clip()
        if not norm < float("inf"):
            raise Diverged(
                f"the gradient norm is {norm} in step {self.version + 1}: the run has diverged. Resume from the last "
                "checkpoint with a lower learner.learning_rate or learner.max_grad_norm"
            )
        if self._trains_policy:
            self.optimizer.step()
        if self.critic is not None:
            self.critic.optimizer.step()
        return norm

    def _accumulate(self, batch: PreparedBatch, units: Sequence[Unit], counted_N: torch.Tensor) -> StepSums:
        for gradient in self._gradients:
            gradient.zero_()
        rewarded, device = batch.rollouts.rewarded, self.policy.device
        weights_A = rewarded.per_token(self.algorithm.weights(rewarded, counted_N)).to(device, torch.float32)
        columns = batch.columns | {"weights": weights_A}
        sums = StepSums(self.algorithm, has_clip=self.algorithm.settings.steps_per_batch > 1, device=device)
        for micro_batch in self._share(batch.rollouts, units):
            self._backward(
                micro_batch, {name: column_A[micro_batch.token_T] for name, column_A in columns.items()}, sums
            )
        return sums

    def _share(self, rollouts: Rollouts, units: Sequence[Unit]) -> Iterator[MicroBatch]:
        """This rank's units, packed."""
        ranks, device = self.data_parallel, self.policy.device
        mine = list(units)[ranks.shard(unit_costs(rollouts, units))]
        batches = micro_batches(rollouts, mine, max_tokens=self._limit.tokens, device=device)
        return batches if self.sharded is None else in_lockstep(rollouts, batches, units, ranks=ranks, device=device)

    def _backward(self, batch: MicroBatch, columns: Mapping[str, torch.Tensor], sums: StepSums) -> None:
        """Add the gradient of one micro-batch, and what it says of the step to `sums`."""
        algorithm, entropy_coefficient = self.algorithm, self.algorithm.settings.entropy_coefficient
        reference_T = columns.get("reference")
        if algorithm.reference_in_loss and reference_T is None:
            reference_T = reference_logprobs(self.policy, batch)
        with torch.set_grad_enabled(self._trains_policy):
            logprobs_T, entropy_T, hidden_TH = self.policy.logprobs(
                batch, entropy_requires_grad=entropy_coefficient != 0, keep_hidden=self.critic is not None
            )
            inputs = LossInputs(
                rows_T=batch.row_T,
                advantages_T=columns["advantages"],
                weights_T=columns["weights"],
                behavior_logprobs_T=batch.behavior_logprobs_T,
                policy_logprobs_T=logprobs_T,
                old_logprobs_T=columns["old"] if self.algorithm.settings.steps_per_batch > 1 else logprobs_T.detach(),
                reference_logprobs_T=reference_T,
            )
            loss = algorithm.loss(inputs)
            if entropy_coefficient:
                loss = loss - entropy_coefficient * (entropy_T * inputs.weights_T).sum()
        if self._trains_policy:
            (loss * (0.0 if batch.is_padding else self._loss_scale)).backward()
        value_loss = None
        if self.critic is not None:
            assert hidden_TH is not None
            value_loss = self.critic.loss(hidden_TH, columns["values"], columns["returns"], columns["weights"])
            (value_loss * (0.0 if batch.is_padding else 1.0)).backward()
        if batch.is_padding:
            return
        with torch.no_grad():
            self.policy_logprobs_A[batch.token_T] = inputs.old_logprobs_T.float()
            sums.add(batch, inputs, loss=loss, entropy_T=entropy_T, value_loss=value_loss)

    def _report(self, stats: StepStats, batch: PreparedBatch, sums: Sequence[StepSums]) -> None:
        algorithm = self.algorithm
        StepSums.write(stats, sums)
        stats.pairs, stats.ties = batch.advantages.pairs, batch.advantages.ties
        if self.critic is None:
            stats.value_loss = None
        else:
            stats.explained_variance = batch.explained_variance()
        if not (algorithm.reference_in_loss or algorithm.reference_in_reward):
            stats.reference_kl = None
            return
        stats.kl_coefficient, target = algorithm.kl_coefficient, algorithm.settings.kl_target
        if target is not None:
            measured = stats.reference_kl or 0.0
            algorithm.kl_coefficient = kl.adapt_coefficient(stats.kl_coefficient, measured=measured, target=target)
