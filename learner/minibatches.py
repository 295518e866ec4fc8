"""From a batch to optimizer steps and packed micro-batches.

A micro-batch is one stream of tokens without padding: each prompt once, and then those of its trajectories that are in
it. Knows tensors; knows neither models nor algorithms. Suffixes: N trajectories, S stream, T sampled tokens (those that
have a log-probability).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from learner.batch import Rollouts
from learner.packing import Packing, Segment
from learner.parallel.data_parallel import DataParallel

Unit = tuple[int, ...]  # trajectories that must be in one micro-batch


@dataclass(frozen=True)
class MicroBatch:
    """One packed stream.

    `hidden_index_T` is the stream position that predicts sampled token t, `row_T` its trajectory, and `token_T` its
    place among all sampled tokens of the batch. `rows` counts the trajectories in the stream. `is_padding`: it is
    computed only because other ranks have one more, and counts for nothing.
    """

    input_ids_S: torch.Tensor
    positions_S: torch.Tensor
    packing: Packing
    hidden_index_T: torch.Tensor
    targets_T: torch.Tensor
    row_T: torch.Tensor
    token_T: torch.Tensor
    behavior_logprobs_T: torch.Tensor
    rows: int
    is_padding: bool = False


def optimizer_steps(
    units: Sequence[Unit], groups_N: torch.Tensor, *, epochs: int, minibatches: int
) -> Iterator[tuple[list[Unit], torch.Tensor]]:
    """The units of each optimizer step, and which trajectories belong to it (bool [N]).

    The groups are split into as many parts as there are minibatches, in each epoch alike.
    """
    count = int(groups_N.max()) + 1
    part_N = groups_N * minibatches // count
    for _ in range(epochs):
        for part in range(minibatches):
            yield [unit for unit in units if int(part_N[unit[0]]) == part], part_N == part


def micro_batches(
    rollouts: Rollouts, units: Sequence[Unit], *, max_tokens: int, device: torch.device | str
) -> Iterator[MicroBatch]:
    """Pack `units` into as few streams of at most `max_tokens` tokens as they need, of about the same size.

    A small rest would take as many launches as a full stream. A unit that is longer gets a stream of its own.
    """
    costs = unit_costs(rollouts, units)
    count = -(-sum(costs) // max_tokens)
    current: list[int] = []
    filled, streams = 0, 0
    for unit, cost in zip(units, costs, strict=True):
        is_full = filled + cost > max_tokens
        if current and (is_full or (filled >= sum(costs) / count and streams < count - 1)):
            yield _pack(rollouts, current, device)
            current, filled, streams = [], 0, streams + 1
            (cost,) = unit_costs(rollouts, [unit])
        current += unit
        filled += cost
    if current:
        yield _pack(rollouts, current, device)


def in_lockstep(
    rollouts: Rollouts,
    batches: Iterable[MicroBatch],
    units: Sequence[Unit],
    *,
    ranks: DataParallel,
    device: torch.device | str,
) -> Iterator[MicroBatch]:
    """A rank's `batches`, padded to the largest number that any rank has; `units` are those of all ranks.

    All ranks must call it: it exchanges one number.
    """
    mine = list(batches)
    most = torch.tensor(len(mine), device=device)
    ranks.maximum(most)
    yield from mine
    if len(mine) < int(most):
        padding = replace(mine[-1] if mine else _pack(rollouts, list(units[0]), device), is_padding=True)
        yield from [padding] * (int(most) - len(mine))


def unit_costs(rollouts: Rollouts, units: Sequence[Unit]) -> list[int]:
    """The tokens that each unit adds to a stream that holds the units before it: its prompt comes once per group."""
    groups, costs, group = rollouts.rewarded.groups_N.tolist(), [], -1
    for unit in units:
        cost = 0
        for row in unit:
            prompt_length = int(rollouts.prompt_lengths[row])
            cost += len(rollouts.token_ids[row]) - prompt_length - 1 + (prompt_length if groups[row] != group else 0)
            group = groups[row]
        costs.append(cost)
    return costs


def _pack(rollouts: Rollouts, rows: list[int], device: torch.device | str) -> MicroBatch:
    ids, positions, segments, hidden_index, targets, owners, places = [], [], [], [], [], [], []
    lengths = rollouts.rewarded.lengths_N.numpy()
    groups, starts = rollouts.rewarded.groups_N.tolist(), lengths.cumsum() - lengths
    offset, group, prompt_start = 0, -1, 0
    for row in rows:
        prompt_length = int(rollouts.prompt_lengths[row])
        tokens, sampled = rollouts.token_ids[row], rollouts.sampled[row]
        if groups[row] != group:
            group, prompt_start = groups[row], offset
            ids.append(tokens[:prompt_length])
            positions.append(np.arange(prompt_length))
            segments.append(Segment(offset, prompt_length))
            offset += prompt_length
        trajectory = tokens[prompt_length:]
        fed = len(trajectory) - 1  # the last token predicts nothing
        if fed:
            ids.append(trajectory[:-1])
            positions.append(np.arange(prompt_length, prompt_length + fed))
            segments.append(Segment(offset, fed, prompt_start, prompt_length))
        # The prompt's last position predicts the first token of every trajectory, and each token the next one.
        predicted_by = np.r_[prompt_start + prompt_length - 1, np.arange(offset, offset + fed)]
        hidden_index.append(predicted_by[sampled])
        targets.append(trajectory[sampled])
        owners.append(np.full(lengths[row], row))
        places.append(np.arange(starts[row], starts[row] + lengths[row]))
        offset += fed

    def tensor(arrays: list[np.ndarray], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device, dtype, non_blocking=True)

    return MicroBatch(
        input_ids_S=tensor(ids),
        positions_S=tensor(positions),
        packing=Packing(segments, device),
        hidden_index_T=tensor(hidden_index),
        targets_T=tensor(targets),
        row_T=tensor(owners),
        token_T=tensor(places),
        behavior_logprobs_T=tensor([rollouts.behavior_logprobs[row] for row in rows], torch.float32),
        rows=len(rows),
    )
