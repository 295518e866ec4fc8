"""Replay: the bounded queue of scored groups between rollout and learner, journaled on disk.

`admit` and `put` acknowledge a group once it is on the disk. A journal segment is a file of records, each with its length
and checksum before an Arrow stream of one group. The learner's checkpoint says which ordinals were trained; `recover`
gives back what was acknowledged and not trained. Knows Arrow and files; knows neither Ray, vLLM nor torch.
"""

import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from actors.disk import sync
from actors.schema import SCHEMA, to_batch, validate
from actors.types import Group
from conf.errors import UsageError
from rewards.variance import is_zero_variance

HEADER = struct.Struct("<4sII")  # magic, length and crc32 of the payload
MAGIC = b"EPH1"


class JournalError(UsageError):
    """A journal that is damaged inside (not merely cut short); names the file and the offset."""


@dataclass
class _Segment:
    path: Path
    ordinals: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Verdict:
    """What became of a scored group: `accepted` into the replay or not, whether because it `is_flat`, and how many of its
    samples are unscorable, with one of their reasons."""

    ordinal: int
    accepted: bool
    unscorable: int
    error: str | None = None
    is_flat: bool = False


class Replay:
    """At most `capacity` groups, each with at least two scorable samples and `quorum` of them. Up to `max_flat` groups between
    two drops (that is, a step) are refused because all their rewards are equal.

    `folder` holds the journal. A new segment begins when the current one exceeds `segment_bytes`.
    """

    def __init__(
        self, folder: Path, *, capacity: int, quorum: float = 0.5, max_flat: int = 0, segment_bytes: int = 64 << 20
    ) -> None:
        self._folder = folder
        self._capacity = capacity
        self._quorum = quorum
        self._max_flat = max_flat
        self._flat = 0
        self._segment_bytes = segment_bytes
        self._held: dict[int, pa.RecordBatch] = {}
        self._segments: list[_Segment] = []
        self._file: int | None = None
        self._next_number = 1
        self.refused = 0
        self._torn_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._held)

    def held(self) -> list[int]:
        """The ordinals of what is held, lowest first."""
        return sorted(self._held)

    def torn(self) -> int:
        """Bytes at the journal's end that a machine's death cut short, and `recover` cut off."""
        return self._torn_bytes

    def recover(self, keep: Callable[[pa.RecordBatch], bool]) -> None:
        """Read the journal and hold every group that `keep` wants; the last record of the last file may be torn.

        Raises JournalError on damage anywhere else. The other groups, and the highest ordinals over the capacity, are dropped
        from the journal, too.
        """
        files = sorted(self._folder.glob("segment-*.journal"))
        found: dict[int, pa.RecordBatch] = {}
        for file in files:
            for batch in self._read(file, is_last=file == files[-1]):
                found[batch.column("ordinal")[0].as_py()] = batch
        kept = [batch for _, batch in sorted(found.items()) if keep(batch)][: self._capacity]
        self._next_number = 1 + max((int(file.stem.split("-")[1]) for file in files), default=0)
        self.put(kept)
        self._delete(files)

    def admit(self, group: Group) -> Verdict:
        """Hold a scored group, once; again it is accepted and nothing happens."""
        scorable = sum(score.reward is not None for score in group.scores)
        error = next((score.error for score in group.scores if score.error), None)
        accepted = scorable >= max(2, math.ceil(self._quorum * len(group.scores)))
        is_new = accepted and group.prompt.ordinal not in self._held
        is_flat = is_new and is_zero_variance([score.reward for score in group.scores if score.reward is not None])
        if is_flat and self._flat < self._max_flat:
            self._flat += 1
            return Verdict(group.prompt.ordinal, False, len(group.scores) - scorable, is_flat=True)
        if is_new:
            self.put([to_batch(group)])
        return Verdict(group.prompt.ordinal, accepted, len(group.scores) - scorable, error)

    def put(self, batches: Sequence[pa.RecordBatch]) -> list[int]:
        """Hold groups and return their ordinals once they are on the disk; one write and one sync for all.

        A group whose ordinal is held already is refused and counted. Raises RowError on an invalid group and OverflowError
        over the capacity; then none of them is held.
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
            self._append(fresh)
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
        """These were trained: let go of them (the journal does at the next `release`)."""
        self._flat = 0
        for ordinal in ordinals:
            del self._held[ordinal]

    def keep(self, ordinals: Sequence[int]) -> None:
        """Let go of every other group, in the journal too: their ordinals will be sampled again."""
        kept = [self._held[ordinal] for ordinal in ordinals]
        if len(kept) < len(self._held):
            self._held.clear()
            self._close_segment()
            dropped, self._segments = self._segments, []
            self.put(kept)
            self._delete([segment.path for segment in dropped])

    def release(self, trained: Callable[[int], bool]) -> None:
        """A checkpoint is safe: delete the segments whose groups have all been trained by then."""
        self._close_segment()
        done = [s for s in self._segments if all(trained(ordinal) for ordinal in s.ordinals)]
        self._segments = [s for s in self._segments if s not in done]
        self._delete([segment.path for segment in done])

    def close(self) -> None:
        self._close_segment()

    def _delete(self, files: Sequence[Path]) -> None:
        for file in files:
            file.unlink()
        sync(self._folder)

    def _append(self, fresh: dict[int, pa.RecordBatch]) -> None:
        if self._file is None:
            path = self._folder / f"segment-{self._next_number:06d}.journal"
            self._next_number += 1
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self._segments.append(_Segment(path))
            sync(self._folder)
        data = b"".join(_record(batch) for batch in fresh.values())
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)
        self._segments[-1].ordinals |= fresh.keys()
        if os.fstat(self._file).st_size > self._segment_bytes:
            self._close_segment()

    def _close_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, file: Path, *, is_last: bool) -> list[pa.RecordBatch]:
        data, offset, batches = file.read_bytes(), 0, []
        while offset < len(data):
            header = data[offset : offset + HEADER.size]
            magic, length, checksum = HEADER.unpack(header) if len(header) == HEADER.size else (MAGIC, len(data), 0)
            if magic != MAGIC:
                raise JournalError(f"{file} is damaged at byte {offset}: no record starts there")
            end = offset + HEADER.size + length
            payload = data[offset + HEADER.size : end]
            if end > len(data) or zlib.crc32(payload) != checksum:
                # A write that the machine's death cut short can only be the last one.
                if not is_last or end < len(data):
                    raise JournalError(f"{file} is damaged at byte {offset}: the record does not match its checksum")
                self._torn_bytes += len(data) - offset
                break
            batches.append(pa.ipc.open_stream(payload).read_next_batch())
            offset = end
        return batches


def _record(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    payload = sink.getvalue().to_pybytes()
    return HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload
