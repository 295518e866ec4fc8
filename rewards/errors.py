"""Errors of rewards, told with the file and line of the user's own code. Plain Python."""

import traceback
from pathlib import Path

from conf.errors import UsageError


class RewardError(UsageError):
    """A reward that cannot be found, imported or called; the message says what to change."""


def describe_error(error: Exception, *, folder: Path | None = None, otherwise: str = "") -> str:
    """`error` in one line: the last file and line inside `folder` that took part, then its type and message.

    The line begins with `otherwise` where no file of `folder` took part.
    """
    message = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{Path(error.filename).name}:{error.lineno}: {type(error).__name__}: {error.msg}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.parent == folder:
            return f"{file.name}:{frame.lineno}: {message}"
    return f"{otherwise}: {message}" if otherwise else message
