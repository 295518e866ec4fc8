"""Groups and tables made by hand for tests."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from actors.replay.schema import to_batch
from actors.types import Group, Prompt, Score, Trajectory, Turn, VersionSpan


def turns_of(*lengths: int, starts_sampled: bool = True) -> tuple[Turn, ...]:
    """Turns of these lengths that alternate: sampled, given, sampled and so on, or the other way round."""
    return tuple(Turn((i % 2 == 0) == starts_sampled, length) for i, length in enumerate(lengths))


def group(
    ordinal: int,
    rewards: Sequence[float | None],
    *,
    prompt: Sequence[int] = (2, 3, 4),
    completions: Sequence[Sequence[int]] | None = None,
    turns: Sequence[Sequence[Turn]] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    version: int = 0,
) -> Group:
    """A scored group; by default number i is one turn of i + 1 sampled tokens of log-probability -1 each."""
    completions = completions or [[5 + i] * (i + 1) for i in range(len(rewards))]
    turns = turns or [turns_of(len(completion)) for completion in completions]
    sampled = [sum(turn.length for turn in of_one if turn.sampled) for of_one in turns]
    logprobs = logprobs or [[-1.0] * count for count in sampled]
    return Group(
        prompt=Prompt(ordinal, "p", tuple(prompt), "q", "1", "task"),
        trajectories=tuple(
            Trajectory(tuple(tokens), tuple(of_one), tuple(values), "text", "stop", (VersionSpan(version, count),))
            for tokens, of_one, values, count in zip(completions, turns, logprobs, sampled, strict=True)
        ),
        worker="w",
        scores=tuple(Score(r, {} if r is None else {"numeric": r}) for r in rewards),
    )


def scored(unscored: Group) -> Group:
    """Any reward that tells completions apart."""
    return replace(unscored, scores=tuple(Score(float(len(c.text) % 7)) for c in unscored.trajectories))


def table(groups: Sequence[Group]) -> pa.Table:
    return pa.Table.from_batches([to_batch(g) for g in groups])
