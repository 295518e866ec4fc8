"""UsageError, the base class of every error that a user can correct. launch.py prints its message, and no traceback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UsageError(ValueError):
    """Something in the settings, the data or the machine is wrong; the message says what to change."""

    exit_code = 2


class DiskError(UsageError):
    """A disk that does not take or give a file: full, read-only or broken."""


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError, as of a full or read-only disk, into a DiskError about `folder`."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{folder} cannot be written or read ({error.strerror or error}): make space or change its permissions, or "
            "choose another run.folder"
        ) from error
