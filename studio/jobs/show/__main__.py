"""The process that shows data: `python -m studio.jobs.show`, started by `studio.runs.show`; JSON lines in and out."""

import faulthandler
import os
import queue
import time
import traceback
from contextlib import suppress
from typing import Any

from studio.core.errors import JobFailed, StudioError
from studio.core.recipe_parse import read_table
from studio.jobs.base.failures import explain
from studio.jobs.base.line import Line
from studio.jobs.base.torchless import hide_torch
from studio.runs.disk import disk_failure
from studio.runs.failure import Doing, memory_failure, ran_out_of_memory
from studio.runs.piped import Loading, NotAnswered
from studio.runs.show import ShowRequest

_TELL_SECONDS = 0.3
_GENTLE = 10


def main() -> None:
    """Read the rows, add them up, and answer in between, until the other end is closed."""
    faulthandler.enable()  # otherwise a fault in native code ends the process without any output
    line = Line()
    given = line.asked.get()["load"]
    line.tell(Loading("starting"))
    try:
        request = ShowRequest(**given | {"recipe": read_table(given["recipe"])[0]})
        if request.gentle:
            with suppress(AttributeError, OSError):  # Windows has none
                os.nice(_GENTLE)
        if not request.recipe.model.trust_remote_code:
            hide_torch()
        from studio.jobs.show.session import Session  # noqa: PLC0415  transformers: a second, after the sign of life

        session = Session(request, lambda detail, fraction: line.tell(Loading(detail, fraction)))
    except BaseException as error:
        line.tell(_failure(error, fatal=True))
        raise
    line.tell(session.opened)
    try:
        _serve(line, session)
    except BaseException as error:
        line.tell(_failure(error, fatal=True))
        raise


def _serve(line: Line, session: Any) -> None:
    """Add up chunk after chunk; what is asked comes first."""
    told, stopped = time.monotonic(), False
    line.tell(session.tally.summary(session.seq_len, session.end_token))
    while True:
        adding = not stopped and session.tally.done < session.opened.rows
        try:
            asked = line.asked.get(block=not adding)
        except queue.Empty:
            session.add_up()
            if time.monotonic() - told > _TELL_SECONDS or session.tally.done >= session.opened.rows:
                line.tell(session.tally.summary(session.seq_len, session.end_token))
                told = time.monotonic()
            continue
        if asked.get("stop"):
            stopped = True
            continue
        try:
            line.tell(_answer(asked, session, line))
        except Exception as error:  # noqa: BLE001  one row that fails must not lose the others
            traceback.print_exception(error)
            line.tell(_failure(error, fatal=False))


def _answer(asked: dict[str, Any], session: Any, line: Line) -> Any:
    if "seq_len" in asked:
        session.cut_at(int(asked["seq_len"]), int(asked["rows_per_step"]))
        return session.tally.summary(session.seq_len, session.end_token)
    if "number" in asked:
        return session.numbered(int(asked["number"]))
    if "next" in asked:
        return session.next_row(**asked["next"], interrupted=lambda: not line.asked.empty())
    return session.row(int(asked["place"]))


def _failure(error: BaseException, *, fatal: bool) -> NotAnswered:
    if isinstance(error, JobFailed):
        return NotAnswered(str(error), error.advice, fatal, bad_input=True)
    if isinstance(error, StudioError):
        return NotAnswered(str(error), fatal=fatal, bad_input=True)
    if ran_out_of_memory(error):
        failure: JobFailed | None = memory_failure(error, Doing("show", "loading"))
    else:
        failure = disk_failure(error, advice="then look again") or explain(error)
    if failure:
        return NotAnswered(str(failure), failure.advice, fatal)
    return NotAnswered(f"unexpected {type(error).__name__}: {error}", "report it, with the row if you can", fatal)


if __name__ == "__main__":
    main()
