"""The early end that a user asked for."""

from studio.core.errors import StudioError


class Stopped(StudioError):
    """The user asked for an early end; what was done is kept."""
