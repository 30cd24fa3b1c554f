"""What an exception of a job is called in the run's log, and what the user can do about it."""

import traceback
from collections.abc import Callable

from studio.core.errors import BadInput, JobFailed

BAD_INPUT = "bad_input"
"""The kind of a failure whose reason is what the job was given."""

Explain = Callable[[BaseException], JobFailed | None]
"""Gives an exception of the job's libraries (out of memory on the card ...) our name and advice, or None."""


def not_explained(error: BaseException) -> JobFailed | None:
    """The `Explain` of a job whose libraries need none."""
    del error
    return None


def failure_of(error: BaseException | None, explain: Explain) -> JobFailed:
    """Return the failure that an exception means; None stands for a job that ended without a terminal event."""
    match error:
        case None:
            failure = JobFailed("no_result", "the job ended without saying how", "Report this: it is a fault of ours.")
        case JobFailed():
            failure = error
        case _:
            failure = _explained(error, explain) or _by_type(error)
    return failure


def _explained(error: BaseException, explain: Explain) -> JobFailed | None:
    """An explanation that fails itself (it imports the library that could not be imported) is none."""
    try:
        return explain(error)
    except Exception:  # noqa: BLE001  whatever it is, the error to tell is the first one
        return None


def _by_type(error: BaseException) -> JobFailed:
    match error:
        case BadInput():
            return JobFailed(BAD_INPUT, str(error), "Correct it and start a new run.")
        case KeyboardInterrupt():
            message = "interrupted before the job could stop in order"
            return JobFailed("interrupted", message, "Continue with: lora-studio runs resume RUN")
        case MemoryError():
            return JobFailed("out_of_memory", "the computer's memory is full", "Lower micro-batch or sequence length.")
    what = "".join(traceback.format_exception_only(error)).strip()
    return JobFailed("error", what, "The traceback is at the end of output.log in the run's folder.")
