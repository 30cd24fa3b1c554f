"""The chat's process: `python -m studio.jobs.chat`, started by `studio.runs.chat`; JSON lines in and out."""

import faulthandler
import traceback

from studio.core.errors import JobFailed, StudioError
from studio.jobs.base.failures import explain
from studio.jobs.base.line import Line
from studio.runs.chat import ChatRequest, Ready, Sampling, TurnDone
from studio.runs.disk import disk_failure
from studio.runs.failure import Doing, memory_failure, ran_out_of_memory
from studio.runs.native import native_failure
from studio.runs.piped import Loading, NotAnswered


def main() -> None:
    """Load the model, then answer questions until the other end is closed."""
    faulthandler.enable()  # otherwise a fault in native code ends the process without any output
    line = Line()
    request = ChatRequest(**line.asked.get()["load"])
    line.tell(Loading("starting"))
    try:
        from studio.jobs.chat.session import Session  # noqa: PLC0415  torch: seconds, after the first sign of life

        session = Session(request, lambda detail, fraction: line.tell(Loading(detail, fraction)))
    except BaseException as error:
        line.tell(_failure(error, fatal=True))
        raise
    line.tell(Ready(session.sides, session.device_name, session.dtype_name, tuple(session.notes)))
    while True:
        asked = line.asked.get()
        try:
            sampling = Sampling(**asked["sampling"])
            for side, messages in asked["ask"].items():
                if not line.cancelled.is_set():
                    session.answer(side, messages, sampling, line.tell, line.cancelled.is_set)
            line.tell(TurnDone())
        except Exception as error:  # noqa: BLE001  one question that fails must not lose the loaded model
            traceback.print_exception(error)
            line.tell(_failure(error, fatal=False))
            line.tell(TurnDone())


def _failure(error: BaseException, *, fatal: bool) -> NotAnswered:
    if isinstance(error, JobFailed):
        return NotAnswered(str(error), error.advice, fatal)
    if isinstance(error, StudioError):
        return NotAnswered(str(error), fatal=fatal, bad_input=True)
    if ran_out_of_memory(error):
        failure: JobFailed | None = memory_failure(error, Doing("chat", "loading" if fatal else "chatting"))
    else:
        again = "then start the chat again"
        failure = disk_failure(error, advice=again) or explain(error) or native_failure(str(error), then=again)
    if failure:
        return NotAnswered(str(failure), failure.advice, fatal)
    return NotAnswered(f"unexpected {type(error).__name__}: {error}", "report it, with what you asked", fatal)


if __name__ == "__main__":
    main()
