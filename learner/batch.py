"""From an Arrow table of rollouts to packed micro-batches.

A micro-batch is one stream of tokens: each prompt once, then those of its completions that are in it, without
padding. Knows Arrow and tensors; knows neither models nor objectives. Suffixes: N completions, S stream, T completion
tokens (the ones with a log-probability).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from learner.attention import Packing, Segment
from learner.terms import Scored


@dataclass(frozen=True)
class Rollouts:
    """A table as arrays; completion n has `token_ids[n]`, of which the first `prompt_lengths[n]` are the prompt."""

    token_ids: list[np.ndarray]
    prompt_lengths: np.ndarray
    behavior_logprobs: list[np.ndarray]
    scored: Scored

    @classmethod
    def from_table(cls, table: pa.Table) -> "Rollouts":
        ordinals = table.column("ordinal").to_numpy()
        _, groups = np.unique(ordinals, return_inverse=True)
        rewards = table.column("reward").to_numpy(zero_copy_only=False).astype(np.float64)
        token_ids = [np.asarray(x.values) for x in table.column("token_ids")]
        logprobs = [np.asarray(x.values) for x in table.column("behavior_logprobs")]
        lengths = np.array([len(x) for x in logprobs])
        truncated = [reason == "length" for reason in table.column("finish_reason").to_pylist()]
        named = [dict(terms) for terms in table.column("reward_terms").to_pylist()]
        terms = {
            name: torch.tensor([terms.get(name, float("nan")) for terms in named], dtype=torch.float64)
            for name in sorted({name for terms in named for name in terms})
        }
        scored = Scored(
            torch.from_numpy(rewards),
            torch.from_numpy(groups),
            torch.from_numpy(lengths),
            torch.tensor(truncated),
            terms,
        )
        return cls(token_ids, table.column("prompt_length").to_numpy(), logprobs, scored)

    @cached_property
    def starts_N(self) -> np.ndarray:
        """Where each completion's tokens begin when all completions follow each other."""
        lengths = self.scored.lengths_N.numpy()
        return lengths.cumsum() - lengths


@dataclass(frozen=True)
class MicroBatch:
    """One packed stream. `hidden_index_T` says which stream position predicts completion token t, `row_T` whose it is, and
    `token_T` where it is among all completion tokens of the batch; `rows` are the completions in it."""

    input_ids_S: torch.Tensor
    positions_S: torch.Tensor
    packing: Packing
    hidden_index_T: torch.Tensor
    targets_T: torch.Tensor
    row_T: torch.Tensor
    token_T: torch.Tensor
    behavior_logprobs_T: torch.Tensor
    rows: int


def micro_batches(
    rollouts: Rollouts, units: Sequence[Sequence[int]], *, max_tokens: int, device: torch.device | str
) -> Iterator[MicroBatch]:
    """Pack the completions of `units`, each unit whole, into as few streams of at most `max_tokens` tokens as they need, of
    about the same size: a small rest would take as many launches as a full one. A longer single unit gets its own."""
    all_costs = costs(rollouts, units)
    count = -(-sum(all_costs) // max_tokens)
    current: list[int] = []
    filled, streams = 0, 0
    for unit, cost in zip(units, all_costs, strict=True):
        is_full = filled + cost > max_tokens
        if current and (is_full or (filled >= sum(all_costs) / count and streams < count - 1)):
            yield _pack(rollouts, current, device)
            current, filled, streams = [], 0, streams + 1
            (cost,) = costs(rollouts, [unit])
        current += unit
        filled += cost
    if current:
        yield _pack(rollouts, current, device)


def costs(rollouts: Rollouts, units: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that each unit adds to a stream that holds the units before it: its prompt comes once a group."""
    lengths, groups = rollouts.scored.lengths_N.tolist(), rollouts.scored.groups_N.tolist()
    found, group = [], -1
    for unit in units:
        found.append(0)
        for row in unit:
            found[-1] += lengths[row] - 1 + (int(rollouts.prompt_lengths[row]) if groups[row] != group else 0)
            group = groups[row]
    return found


def _pack(rollouts: Rollouts, rows: list[int], device: torch.device | str) -> MicroBatch:
    ids, positions, segments, hidden_index, targets, owners, places = [], [], [], [], [], [], []
    groups, starts = rollouts.scored.groups_N.tolist(), rollouts.starts_N
    offset, group, prompt_start = 0, -1, 0
    for row in rows:
        prompt_length = int(rollouts.prompt_lengths[row])
        tokens = rollouts.token_ids[row]
        if groups[row] != group:
            group, prompt_start = groups[row], offset
            ids.append(tokens[:prompt_length])
            positions.append(np.arange(prompt_length))
            segments.append(Segment(offset, prompt_length))
            offset += prompt_length
        completion = tokens[prompt_length:]
        fed = len(completion) - 1  # the last token predicts nothing
        if fed:
            ids.append(completion[:-1])
            positions.append(np.arange(prompt_length, prompt_length + fed))
            segments.append(Segment(offset, fed, prompt_start, prompt_length))
        # The prompt's last position predicts the first token of every completion.
        hidden_index.append(np.r_[prompt_start + prompt_length - 1, np.arange(offset, offset + fed)])
        targets.append(completion)
        owners.append(np.full(len(completion), row))
        places.append(np.arange(starts[row], starts[row] + len(completion)))
        offset += fed

    def tensor(arrays: list[np.ndarray], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device, dtype, non_blocking=True)

    return MicroBatch(
        tensor(ids), tensor(positions), Packing(segments, device), tensor(hidden_index), tensor(targets), tensor(owners),
        tensor(places),
        tensor([rollouts.behavior_logprobs[row] for row in rows], torch.float32), len(rows),
    )  # fmt: skip
