"""The process of a job from its start to its exit code: it takes the run, waits for its turn, and does the work."""

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.events import Finished, Phase
from studio.core.recipe import Recipe
from studio.runs.beside import begin, teller_of_troubles
from studio.runs.disk import refuses
from studio.runs.failure import Explain, not_explained
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.queue import Queue, Turn, place_key, wait_for_turn
from studio.runs.silence import Watchdog
from studio.runs.worker import Worker


def run_job(
    run: Path,
    body: Callable[[Worker], None],
    *,
    explain: Explain = not_explained,
    card: str | None = None,
    watched: bool = False,
) -> int:
    """Run a job's body as the worker of a run and return the exit code of its process; a busy run is refused with 1.

    Args:
        run: The run's folder.
        body: Does the work.
        explain: Names the errors of the job's libraries.
        card: What the launch calls the card on which the job counts as at work, so that queued runs wait for its end:
            a UUID or a number, empty for the CPU. None for jobs that leave cards alone.
        watched: Whether a watchdog warns when the job tells nothing for long; for trainings, whose steps have a pace.
    """
    worker = Worker(RunPaths(run.absolute()), explain=explain)
    _forgive_full_output()
    try:
        with worker:
            if worker.requested("queued"):
                # Before the body imports anything: torch reads a card's environment when it is imported.
                turn = wait_for_turn(
                    worker.paths,
                    lambda: worker.requested("stop"),
                    _teller(worker),
                    worker.sleep,
                    # It has waited for hours, and would lose its place for a disk that is full for a minute.
                    patiently=lambda attempt: worker.patiently("the queue cannot be written", attempt),
                    otherwise=place_key(card or ""),
                )
                if turn is None:
                    worker.emit(Finished, outcome="stopped", step=0, seconds=0.0)
                    return 0
                os.environ.update(turn.environment)
                held = turn.hold
            else:
                held = None if card is None else Queue().take(worker.paths, place_key(card))
            begin(worker.paths, track=asked_trackers(worker.paths) if watched else (), training=watched)
            worker.looks.append(teller_of_troubles(worker.paths, worker.emit))
            with Watchdog(worker) if watched else nullcontext():
                body(worker)
            del held  # a lock that nothing refers to is given back, so it is kept until here
    except (StudioError, OSError) as error:
        with suppress(OSError):  # that it cannot be printed must not hide the error itself
            traceback.print_exception(error)
        return 1
    return worker.exit_code


def asked_trackers(paths: RunPaths) -> tuple[str, ...]:
    """Return the trackers that a run's recipe asks for, by their libraries; none for other jobs."""
    try:
        recipe = read_job(paths, Recipe)
    except BadInput:  # the job says so
        return ()
    return recipe.train.track if recipe else ()


def _teller(worker: Worker) -> Callable[[Turn], None]:
    """Return what tells the run's log where it stands in the queue."""

    def tell(turn: Turn) -> None:
        behind = f"{turn.before} before it" if turn.before else "next"
        at_work = f"; at work: {', '.join(turn.at_work)}" if turn.at_work else ""
        worker.emit(Phase, name="queued", detail=f"{behind}{at_work}")

    return tell


class _ForgivingFile(io.FileIO):
    """Standard output or error of a worker. What a full disk does not take is dropped: a print must not end a run."""

    def write(self, data: Any) -> int:
        """Write what the disk takes and report all of it as written: less would be an error to the caller."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if not refuses(error):
                raise
            return memoryview(data).nbytes


def _forgive_full_output() -> None:
    """Let printing never fail for a full disk: both streams of a worker are a file on the run's disk.

    Streams that something else has put in their place, such as a test, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):
            raw = _ForgivingFile(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True))
