"""UsageError: the base of every error that a user can put right. launch.py shows its message without a traceback."""


class UsageError(ValueError):
    """Something in the settings, the data or the machine; the message says what to change."""

    exit_code = 2
