"""How a job ends early: what the user asked for, and what torch and its friends raise, with a name and advice.

Memory, disks and cards are not here: `studio.runs` knows them (`failure`, `disk`, `native`). By name and text, so that
nothing has to be imported to explain that an import failed.
"""

from studio.core.errors import JobFailed, StudioError


class Cancelled(StudioError):
    """The user asked for an early end. Each job decides what it keeps: an audit its whole parts, a merge nothing."""


def explain(error: BaseException) -> JobFailed | None:
    """Return our failure for an exception of the libraries, or None for one that we have nothing to say about."""
    if type(error).__name__ == "SafetensorError":
        return JobFailed("bad_weights", f"the weights cannot be read: {error}", "download or copy the model again")
    return None
