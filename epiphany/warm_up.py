"""The warm-up: supervised steps on demonstrations before the first rollout. Knows the learners; knows no engine."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from actors.data.demonstrations import Demonstrations
from actors.engines.base import Diverged
from actors.replay.schema import to_batch
from actors.types import Group
from conf.errors import disk_errors
from conf.schema import WarmupSettings
from learner.parallel.group import LearnerGroup


def warm_up(
    learners: LearnerGroup,
    demonstrations: Demonstrations,
    settings: WarmupSettings,
    *,
    seed: int,
    log: Path,
    stop: Callable[[], bool],
) -> str | None:
    """Take all steps and write them to `log`; a line for the user, or None if it was asked to stop before the end.

    Raises DiskError if the log cannot be written.
    """
    losses: list[float] = []
    lines = []
    for table in batches(demonstrations.groups, settings, seed=seed):
        if stop():
            return None
        try:
            stats = learners.warm_up(table)
        except Diverged as error:
            raise Diverged(f"the warm-up diverged in step {len(losses) + 1}; lower warmup.learning_rate") from error
        losses.append(stats.loss)
        row = {"step": stats.version, "loss": stats.loss, "tokens": stats.trained_tokens, "seconds": stats.seconds}
        lines.append(json.dumps(row) + "\n")
        with disk_errors(log.parent):
            log.write_text("".join(lines))
    learners.end_warm_up()
    left_out = f"; {demonstrations.too_long} were too long" if demonstrations.too_long else ""
    return (
        f"warmed up in {len(losses)} steps on {len(demonstrations.groups)} demonstrations{left_out}: "
        f"loss {losses[0]:.3f} to {losses[-1]:.3f} nats a token"
    )


def batches(groups: Sequence[Group], settings: WarmupSettings, *, seed: int) -> Iterator[pa.Table]:
    """The rows of each step, in epochs of a seeded order."""
    order: list[int] = []
    epoch = 0
    for _ in range(settings.steps):
        while len(order) < settings.demonstrations_per_step:
            numbers = list(range(len(groups)))
            random.Random(f"warmup:{seed}:{epoch}").shuffle(numbers)
            order, epoch = [*order, *numbers], epoch + 1
        chosen, order = order[: settings.demonstrations_per_step], order[settings.demonstrations_per_step :]
        # The ordinal is the place in the batch: with few demonstrations one may come twice.
        placed = [
            replace(groups[number], prompt=replace(groups[number].prompt, ordinal=place))
            for place, number in enumerate(chosen)
        ]
        yield pa.Table.from_batches([to_batch(group) for group in placed])
