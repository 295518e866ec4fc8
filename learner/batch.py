"""From an Arrow table of rollouts to arrays: what was sampled, and how it was scored.

Knows Arrow and tensors; knows neither models nor algorithms. Suffixes: N trajectories of the batch, A their sampled
tokens one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from learner.losses.segments import segment_sums


@dataclass(frozen=True)
class RewardedBatch:
    """A batch as it was scored.

    `rewards_N` (float64, NaN for none) and their `terms` (NaN where one does not apply), the number of the prompt's
    group `groups_N`, the count of sampled tokens `lengths_N`, and whether the trajectory was cut off at `max_tokens`.
    """

    rewards_N: torch.Tensor
    groups_N: torch.Tensor
    lengths_N: torch.Tensor
    truncated_N: torch.Tensor
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def per_token(self, values_N: torch.Tensor) -> torch.Tensor:
        """The value of each trajectory for each of its sampled tokens: [A]."""
        return values_N.repeat_interleave(self.lengths_N)

    def sums(self, values_A: torch.Tensor) -> torch.Tensor:
        """The sum over each trajectory's sampled tokens: [N]."""
        count = len(self.lengths_N)
        return segment_sums(values_A, self.per_token(torch.arange(count)), count)

    @property
    def last_token_N(self) -> torch.Tensor:
        """Where each trajectory's last sampled token is among all: [N]."""
        return self.lengths_N.cumsum(0) - 1


@dataclass(frozen=True)
class Rollouts:
    """A table as arrays.

    Row n has the tokens `token_ids[n]`, of which the first `prompt_lengths[n]` are the prompt; `sampled[n]` marks,
    behind the prompt, those that the policy sampled. `behavior_logprobs[n]` are of the sampled tokens alone.
    """

    token_ids: list[np.ndarray]
    prompt_lengths: np.ndarray
    sampled: list[np.ndarray]
    behavior_logprobs: list[np.ndarray]
    rewarded: RewardedBatch

    @property
    def sampled_tokens(self) -> int:
        return int(self.rewarded.lengths_N.sum())

    @classmethod
    def from_table(cls, table: pa.Table) -> "Rollouts":
        _, groups = np.unique(table.column("ordinal").to_numpy(), return_inverse=True)
        rewards = table.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
        logprobs = [np.asarray(x.values) for x in table.column("behavior_logprobs")]
        truncated = [reason == "length" for reason in table.column("finish_reason").to_pylist()]
        rows = [dict(terms) for terms in table.column("reward_terms").to_pylist()]
        terms = {
            name: torch.tensor([row.get(name, float("nan")) for row in rows], dtype=torch.float64)
            for name in sorted({name for row in rows for name in row})
        }
        return cls(
            token_ids=[np.asarray(x.values) for x in table.column("token_ids")],
            prompt_lengths=table.column("prompt_length").to_numpy(),
            sampled=[
                np.repeat([turn["sampled"] for turn in turns], [turn["length"] for turn in turns])
                for turns in table.column("turns").to_pylist()
            ],
            behavior_logprobs=logprobs,
            rewarded=RewardedBatch(
                torch.from_numpy(rewards),
                torch.from_numpy(groups),
                torch.from_numpy(np.array([len(x) for x in logprobs])),
                torch.tensor(truncated),
                terms,
            ),
        )
