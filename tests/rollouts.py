"""Groups and tables made by hand for tests."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from actors.schema import to_batch
from actors.types import Completion, Group, Prompt, Score, VersionSpan


def group(
    ordinal: int,
    rewards: Sequence[float | None],
    *,
    prompt: Sequence[int] = (2, 3, 4),
    completions: Sequence[Sequence[int]] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    version: int = 0,
) -> Group:
    """A scored group; by default completion i has i + 1 tokens with log-probability -1 each."""
    completions = completions or [[5 + i] * (i + 1) for i in range(len(rewards))]
    logprobs = logprobs or [[-1.0] * len(c) for c in completions]
    return Group(
        prompt=Prompt(ordinal, "p", tuple(prompt), "q", "1", "task"),
        completions=tuple(
            Completion(str(i), tuple(c), tuple(p), "text", "stop", (VersionSpan(version, len(c)),))
            for i, (c, p) in enumerate(zip(completions, logprobs, strict=True))
        ),
        worker="w",
        scores=tuple(Score(r, {} if r is None else {"numeric": r}) for r in rewards),
    )


def scored(unscored: Group) -> Group:
    """Any reward that tells completions apart."""
    return replace(unscored, scores=tuple(Score(float(len(c.text) % 7)) for c in unscored.completions))


def table(groups: Sequence[Group]) -> pa.Table:
    return pa.Table.from_batches([to_batch(g) for g in groups])
