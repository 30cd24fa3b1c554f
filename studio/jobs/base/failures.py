"""How a job ends early: the exception for a user's stop, and our words for exceptions of the libraries.

Failures of memory, disks and cards are explained in `studio.runs` (`failure`, `disk`, `native`). Exceptions are
recognised by name, so that nothing has to be imported to explain that an import failed.
"""

from studio.core.errors import JobFailed, StudioError


class Cancelled(StudioError):
    """The user asked for an early end. Each job decides what it keeps: an audit its finished parts, a merge nothing."""


def explain(error: BaseException) -> JobFailed | None:
    """Return a failure with advice for an exception of the libraries, or None for one that it does not know."""
    if type(error).__name__ == "SafetensorError":
        return JobFailed("bad_weights", f"the weights cannot be read: {error}", "download or copy the model again")
    return None
