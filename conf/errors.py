"""UsageError, the base class of every error that a user can correct. launch.py prints its message, and no traceback."""


class UsageError(ValueError):
    """Something in the settings, the data or the machine is wrong; the message says what to change."""

    exit_code = 2
