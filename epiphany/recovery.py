"""What a run keeps between sessions: its checkpoints' ledger, and which rows of the journal it may use.

Knows the replay and the learner's checkpoints; starts nothing but the replay.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from actors.ledger import Ledger, LedgerState
from actors.replay.admission import AdmissionPolicy
from actors.replay.queue import Replay
from actors.runtime.supervisor import Supervisor
from conf.schema import Settings
from epiphany.report.run_folder import Layout
from learner.parallel.worker import Resumed


def ledger_of(resumed: Resumed) -> Ledger:
    """The ledger that a checkpoint stores."""
    return Ledger.restore(cast(LedgerState, resumed.state["ledger"]))


def order_of(resumed: Resumed) -> Mapping[str, Any]:
    """What a checkpoint stores of the order of the prompts."""
    return cast("Mapping[str, Any]", resumed.state.get("prompts", {}))


def make_replay(
    settings: Settings, folder: Path, ledger: Ledger, version: int, max_scores: Mapping[str, float | None]
) -> Replay:
    """The replay, with what its journal in `folder` holds that is not trained and is fresh enough at `version`."""
    algorithm, max_staleness = settings.algorithm, settings.runtime.max_staleness

    def is_usable(batch: pa.RecordBatch) -> bool:
        versions = [span["version"] for spans in batch.column("version_spans").to_pylist() for span in spans]
        is_fresh = max(versions) <= version and version - min(versions) <= max_staleness
        return is_fresh and not ledger.is_finished(batch.column("ordinal")[0].as_py())

    resamples = algorithm.zero_variance_groups == "resample"
    replay = Replay(
        folder,
        capacity=2 * algorithm.prompts_per_step * (1 + max_staleness),
        policy=AdmissionPolicy(
            min_scored_fraction=settings.reward.min_scored_fraction,
            max_zero_variance=round(algorithm.max_resampled * algorithm.prompts_per_step) if resamples else 0,
            max_scores=max_scores,
        ),
    )
    replay.recover(is_usable)
    return replay


def start_replay(
    supervisor: Supervisor,
    settings: Settings,
    folder: Layout,
    *,
    ledger: Ledger,
    version: int,
    max_scores: Mapping[str, float | None],
) -> list[str]:
    """Start the replay with what was acknowledged, is not trained and may still be; enter it in the `ledger`.

    Strictly on-policy, a batch is kept only if it is complete: half a batch sampled again beside a half from the
    journal would differ in its last bits from the batch of a run that was never interrupted. None is kept where the
    order needs to know which of the dropped groups were solved: the journal holds no dropped ones. Returns lines for
    the user.
    """
    journal = folder.journal.resolve()
    make = partial(make_replay, settings, journal, ledger, version, max_scores)
    (replay,) = supervisor.start("replay", 1, lambda _name: make)
    stored, torn_bytes = supervisor.retry_on_worker_loss(
        lambda: (replay.submit(Replay.held).result(), replay.submit(Replay.torn_bytes).result())
    )
    if settings.runtime.max_staleness == 0:
        # If more is held (prompts_per_step was larger), the rest would be too old once the first batch is trained.
        size = settings.algorithm.prompts_per_step
        forgets = settings.data.revisit_solved < 1 and settings.algorithm.zero_variance_groups == "resample"
        stored = stored[:size] if len(stored) >= size and not forgets else []
        supervisor.retry_on_worker_loss(lambda: replay.submit(Replay.keep, stored).result())
    ledger.restore_stored(stored, version=version)
    if settings.runtime.max_staleness == 0 and stored:
        # A complete batch: what was handed out among it and is not in it had been dropped.
        dropped = [
            ordinal
            for ordinal in range(ledger.low_watermark, max(stored))
            if ordinal not in ledger.stored and not ledger.is_finished(ordinal)
        ]
        ledger.in_flight |= dict.fromkeys(dropped, version)
        ledger.finish(dropped, dropped=True)
    if not stored and not torn_bytes:
        return []
    return [f"{len(stored)} scored groups recovered from the journal; {torn_bytes} torn bytes cut"]
