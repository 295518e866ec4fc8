"""Results that are kept as they come, so that the same command goes on where it was stopped. Knows files alone."""

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from conf.errors import disk_errors

Key = TypeVar("Key", bound=Hashable)


class PartialResults(Generic[Key]):
    """`results` by key, and the file that keeps them, a JSON line for each, until `delete`.

    Results of another `identity` (a hash of all that they depend on) are not read. Raises DiskError.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file = file
        self.results: dict[Key, Any] = {}
        with disk_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = file.read_text().splitlines() if file.is_file() else []
            for line in lines[1:] if lines[:1] == [identity] else []:
                try:
                    key, result = json.loads(line)
                except ValueError:  # the line that was being written
                    break
                self.results[key] = result
            file.write_text("".join([f"{identity}\n", *map(_line, self.results.items())]))

    def add(self, results: Mapping[Key, Any]) -> None:
        """Keep these, too."""
        self.results |= results
        with disk_errors(self.file.parent), self.file.open("a") as stream:
            stream.writelines(map(_line, results.items()))

    def delete(self) -> None:
        """The results are kept elsewhere now."""
        with disk_errors(self.file.parent):
            self.file.unlink(missing_ok=True)


def _line(entry: tuple[Hashable, Any]) -> str:
    return json.dumps(entry) + "\n"
