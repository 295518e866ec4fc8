"""The error of an environment that cannot be used. Plain Python."""

from conf.errors import UsageError


class EnvironmentRefused(UsageError):
    """An environment that cannot be used; the message says what to change."""
