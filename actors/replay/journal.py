"""The journal: scored groups on disk, as a log of framed records.

A segment is a file of records; each is a header (magic, length, checksum) and an Arrow stream of one group. `append`
returns once its records are on the disk. A torn record can only be the last of the last segment; any other damage is an
error that names the byte. Knows Arrow and files; does not know which groups are wanted.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from actors.replay.schema import SCHEMA, VERSION, VERSION_KEY
from conf.errors import UsageError, disk_errors

HEADER = struct.Struct("<4sII")  # magic, length and crc32 of the payload
MAGIC = b"EPH1"


class JournalError(UsageError):
    """A journal that is damaged inside (not merely cut short), or of another version; names the file."""


@dataclass
class _Segment:
    path: Path
    ordinals: set[int] = field(default_factory=set)


class Journal:
    """The segments in `folder`. A new one begins when the current one exceeds `segment_bytes`."""

    def __init__(self, folder: Path, *, segment_bytes: int = 64 << 20) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._segments: list[_Segment] = []
        self._file: int | None = None
        self._next_number = 1
        self.torn_bytes = 0
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> tuple[dict[int, pa.RecordBatch], list[Path]]:
        """The last record of every ordinal, and the files that hold them. Raises JournalError."""
        files = sorted(self._folder.glob("segment-*.journal"))
        groups: dict[int, pa.RecordBatch] = {}
        for file in files:
            for batch in self._read(file, is_last=file == files[-1]):
                groups[batch.column("ordinal")[0].as_py()] = batch
        self._next_number = 1 + max((int(file.stem.split("-")[1]) for file in files), default=0)
        return groups, files

    def append(self, groups: Mapping[int, pa.RecordBatch]) -> None:
        """Write the groups, by ordinal, with one write and one sync. Raises DiskError if it fails."""
        records = b"".join(_record(batch) for batch in groups.values())
        with disk_errors(self._folder):
            self._write(records)
        self._segments[-1].ordinals |= groups.keys()

    def rewrite(self, groups: Mapping[int, pa.RecordBatch]) -> None:
        """Replace everything that was appended by `groups`."""
        self.close()
        replaced, self._segments = self._segments, []
        if groups:
            self.append(groups)
        self.delete([segment.path for segment in replaced])

    def release(self, is_done: Callable[[int], bool]) -> None:
        """Delete the segments of which every ordinal is done."""
        self.close()
        done = [segment for segment in self._segments if all(map(is_done, segment.ordinals))]
        self._segments = [segment for segment in self._segments if segment not in done]
        self.delete([segment.path for segment in done])

    def delete(self, files: Sequence[Path]) -> None:
        with disk_errors(self._folder):
            for file in files:
                file.unlink()
            sync(self._folder)

    def close(self) -> None:
        """Close the current segment; the next record begins another."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, records: bytes) -> None:
        if self._file is None:
            path = self._folder / f"segment-{self._next_number:06d}.journal"
            self._next_number += 1
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            self._segments.append(_Segment(path))
            sync(self._folder)
        size, remaining = os.fstat(self._file).st_size, memoryview(records)
        try:
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)  # what comes next must not follow half a record
            raise
        if os.fstat(self._file).st_size > self._segment_bytes:
            self.close()

    def _read(self, file: Path, *, is_last: bool) -> Iterator[pa.RecordBatch]:
        with disk_errors(self._folder):
            data, offset = file.read_bytes(), 0
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
                self.torn_bytes += len(data) - offset
                return
            batch = pa.ipc.open_stream(payload).read_next_batch()
            version = (batch.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
            if not batch.schema.equals(SCHEMA, check_metadata=True):
                raise JournalError(
                    f"{file} was written by another version of Epiphany (its rows have schema {version}, this one's "
                    f"{VERSION}, or other columns); finish that run with the version that began it, or choose another "
                    "run.name"
                )
            yield batch
            offset = end


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    payload = sink.getvalue().to_pybytes()
    return HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload
