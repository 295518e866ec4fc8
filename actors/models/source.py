"""What the other modules of this package share: ModelSource, ModelError, the cache folder, errors of a disk.

Knows no hub, no file format and no model.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from conf.errors import UsageError


class ModelError(UsageError):
    """A model that cannot be found or loaded; the message says what to change."""


@dataclass(frozen=True)
class ModelSource:
    """A model on disk or on the hub: transformers and vLLM load `path`; `origin` tells the user where it comes from."""

    path: str
    revision: str | None
    origin: str


def cache_folder() -> Path:
    """The folder of converted models: $EPIPHANY_CACHE, or epiphany/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epiphany"
    return Path(os.environ.get("EPIPHANY_CACHE") or default)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


@contextmanager
def writing_to(folder: Path, *, variable: str) -> Iterator[None]:
    """Turn the error of a full or read-only disk into a ModelError.

    The message names `folder` and the environment variable that moves it elsewhere. Other errors pass.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number in FULL:
            raise ModelError(f"{folder}: no space is left; free some, or set {variable} to another folder") from error
        if number in NOT_WRITABLE:
            raise ModelError(f"{folder} cannot be written; set {variable} to a folder that can") from error
        raise


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The system's error number, which safetensors gives as text only."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error))
    return None if match is None else int(match[1])
