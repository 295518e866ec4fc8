"""Read raw rows, each with the place it came from: JSONL, CSV, Parquet, Hugging Face datasets and reasoning-gym.

Says in one sentence what to do with a file that cannot be read. Does not know which columns matter.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import UsageError
from conf.sources import GYM
from rewards.gym import reasoning_gym

RawRow = tuple[str, object]


class DataError(UsageError):
    """Data that cannot be used; names the file, the line and what to change."""


class BadRow(Exception):
    """Why a row cannot be used; a reader yields one in place of a row that it cannot read."""


def read_rows(source: str, *, task: Mapping[str, object], split: str, seed: int) -> Iterator[RawRow]:
    """Every row of `source` as (place, row). Raises DataError if the source cannot be read."""
    file = Path(source).expanduser()
    if source.startswith(GYM):
        yield from _read_gym(source.removeprefix(GYM), task, seed)
    elif file.is_file():
        if file.suffix not in READERS:
            raise DataError(f"data.source: {file} is none of {', '.join(READERS)}")
        yield from READERS[file.suffix](file)
    elif file.is_dir():
        raise DataError(f"data.source: {file} is a folder; name a file in it")
    elif file.suffix in READERS or source.startswith((".", "/", "~")):
        place = "" if file.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"data.source: no file {file}{place}; give its path from there, or an absolute one")
    else:
        yield from _read_hub(source, split)


def _read_jsonl(file: Path) -> Iterator[RawRow]:
    with _text_errors(file), file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.lstrip().startswith("["):
                convert = f"import json; [print(json.dumps(row)) for row in json.load(open('{file}'))]"
                raise DataError(f'{file} is a JSON array; write one row a line: python -c "{convert}" > rows.jsonl')
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except ValueError as error:
                    yield f"{file}:{number}", BadRow(f"not JSON ({error})")


def _read_csv(file: Path) -> Iterator[RawRow]:
    with _text_errors(file), file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        names = list(reader.fieldnames or [])
        delimiter = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
        if delimiter is not None:
            rows = f"csv.reader(open('{file}', newline=''), delimiter={delimiter!r})"
            convert = f"import csv, sys; csv.writer(sys.stdout).writerows({rows})"
            raise DataError(
                f'{file} separates its columns by {delimiter!r}; write commas: python -c "{convert}" > commas.csv'
            )
        for row in reader:
            place = f"{file}:{reader.line_num}"
            surplus = row.pop(None, None)  # type: ignore[call-overload]
            yield place, BadRow(f"{len(surplus)} cells too many") if surplus else row


def _read_parquet(file: Path) -> Iterator[RawRow]:
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{file} is not a complete Parquet file ({reason}); copy or download it again") from error


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


@contextmanager
def _text_errors(file: Path) -> Iterator[None]:
    """Turn the errors of a text file into DataErrors, that of a wrong encoding first of all."""
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
            raise DataError(_wrong_encoding(file, "UTF-16"))
        yield
    except UnicodeDecodeError as error:
        raise DataError(_wrong_encoding(file, "LATIN1")) from error
    except csv.Error as error:
        raise DataError(f"{file} is not a CSV file that can be read ({error}); write it as .jsonl") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check its permissions") from error


def _wrong_encoding(file: Path, likely: str) -> str:
    return (
        f"{file} is not UTF-8 but probably {likely}; convert it: "
        f"iconv -f {likely} -t UTF-8 {file} > {file.stem}-utf8{file.suffix}"
    )


def _read_gym(task: str, options: Mapping[str, object], seed: int) -> Iterator[RawRow]:
    try:
        dataset = reasoning_gym().create_dataset(task, **{"seed": seed, **options})
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"data.source: reasoning-gym refuses {task} with {dict(options)}: {error}") from error
    for i in range(len(dataset)):
        entry = dict(dataset[i])
        yield f"{GYM}{task}: row {i + 1}", {**entry, "metadata": {**entry["metadata"], "source_dataset": task}}


def _read_hub(source: str, split: str) -> Iterator[RawRow]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.source: {source} is no file here, and the hub gives no such dataset ({reason}); check its name, "
            "data.split and the network"
        ) from error
    for number, row in enumerate(dataset, 1):
        yield f"{source}: row {number}", row
