"""Replay: a persistent queue of scored groups between rollout and learner. Each row is used once.

`admit` and `put` acknowledge a group once it is on the disk. The learner's checkpoint says which ordinals were trained;
`recover` returns to the queue what was acknowledged and not trained. Knows Arrow; knows neither Ray, vLLM nor torch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from actors.replay.admission import Admission, AdmissionPolicy
from actors.replay.journal import Journal
from actors.replay.schema import SCHEMA, to_batch, validate
from actors.types import Group


class Replay:
    """At most `capacity` groups, of those that `policy` accepts. `folder` holds the journal."""

    def __init__(
        self, folder: Path, *, capacity: int, policy: AdmissionPolicy | None = None, segment_bytes: int = 64 << 20
    ) -> None:
        self._journal = Journal(folder, segment_bytes=segment_bytes)
        self._capacity = capacity
        self._policy = policy or AdmissionPolicy(min_scored_fraction=0.5, max_zero_variance=0)
        self._held: dict[int, pa.RecordBatch] = {}
        self.refused = 0

    def __len__(self) -> int:
        return len(self._held)

    def held(self) -> list[int]:
        """The ordinals in the queue, lowest first."""
        return sorted(self._held)

    def torn_bytes(self) -> int:
        """Bytes at the journal's end that a crash cut short, and `recover` cut off."""
        return self._journal.torn_bytes

    def recover(self, keep: Callable[[pa.RecordBatch], bool]) -> None:
        """Read the journal and hold every group that `keep` accepts, the lowest ordinals up to the capacity.

        The last record of the last file may be torn. Raises JournalError on damage anywhere else. Groups that are not
        held are dropped from the journal, too.
        """
        groups, files = self._journal.read()
        self.put([batch for _, batch in sorted(groups.items()) if keep(batch)][: self._capacity])
        self._journal.delete(files)

    def admit(self, group: Group) -> Admission:
        """Hold a scored group if the policy accepts it. An ordinal that is held already is accepted, and nothing
        happens.
        """
        if group.prompt.ordinal in self._held:
            unscorable = sum(score.reward is None for score in group.scores)
            return Admission(group.prompt.ordinal, True, len(group.scores), unscorable)
        admission = self._policy.decide(group)
        if admission.accepted:
            self.put([to_batch(group)])
        return admission

    def put(self, batches: Sequence[pa.RecordBatch]) -> list[int]:
        """Hold groups and return their ordinals once they are on the disk, with one write and one sync for all.

        A group whose ordinal is held already is refused and counted. Raises RowError on an invalid group and
        OverflowError over the capacity; then none of them is held.
        """
        fresh: dict[int, pa.RecordBatch] = {}
        for batch in batches:
            validate(batch)
            ordinal = batch.column("ordinal")[0].as_py()
            if ordinal in self._held or ordinal in fresh:
                self.refused += 1
            else:
                fresh[ordinal] = batch
        if len(self._held) + len(fresh) > self._capacity:
            raise OverflowError(
                f"the replay holds {len(self._held)} of {self._capacity} groups; {len(fresh)} more do not fit"
            )
        if fresh:
            self._journal.append(fresh)
            self._held |= fresh
        return list(fresh)

    def batch(self, ordinals: Sequence[int], version: int, max_staleness: int) -> pa.Table:
        """These groups as one table (rows in the order of `ordinals`, then by sample). They stay until `drop`.

        Raises RuntimeError if a row was sampled by a version more than `max_staleness` behind `version`.
        """
        table = pa.Table.from_batches([self._held[ordinal] for ordinal in ordinals], schema=SCHEMA)
        oldest = min(span["version"] for spans in table.column("version_spans").to_pylist() for span in spans)
        if version - oldest > max_staleness:
            raise RuntimeError(
                f"a row of version {oldest} would train version {version}, over max_staleness={max_staleness}"
            )
        return table

    def drop(self, ordinals: Sequence[int]) -> None:
        """These were trained: remove them from the queue (the journal follows at the next `release`)."""
        self._policy.start_step()
        for ordinal in ordinals:
            del self._held[ordinal]

    def keep(self, ordinals: Sequence[int]) -> None:
        """Remove every other group, from the journal, too: its ordinal will be sampled again."""
        if len(ordinals) < len(self._held):
            self._held = {ordinal: self._held[ordinal] for ordinal in ordinals}
            self._journal.rewrite(self._held)

    def release(self, is_trained: Callable[[int], bool]) -> None:
        """A checkpoint is safe: delete the journal's segments whose groups have all been trained by then."""
        self._journal.release(is_trained)

    def close(self) -> None:
        self._journal.close()
