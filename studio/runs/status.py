"""How a run stands. Nothing of it is stored: it follows from the log's end, the lock and the processes."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from studio.core.events import Failed, Finished, Paused, Started
from studio.runs.control import requested
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.log_parts import LogEnd, log_tail
from studio.runs.process import ProcessMark, is_alive, is_here, read_mark
from studio.runs.restarts import read_guard

_MOMENT_SECONDS = 30.0
"""How long a new folder counts as starting though no process is known for it."""


class Status(StrEnum):
    """What a run is doing, or how it ended."""

    starting = "starting"
    queued = "queued"
    restarting = "restarting"
    running = "running"
    paused = "paused"
    stopping = "stopping"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"
    crashed = "crashed"

    @property
    def live(self) -> bool:
        """Whether a process works on the run, or is about to."""
        return self not in (Status.finished, Status.stopped, Status.failed, Status.crashed)


def run_status(
    paths: RunPaths, *, now: float | None = None, tail: LogEnd | None = None, guarded: bool = True
) -> Status:
    """Return how the run stands.

    Args:
        paths: The run.
        now: Unix seconds, by which a folder that was made a moment ago is known; None asks the clock.
        tail: The end of the run's log, where it was read a moment ago; None reads it.
        guarded: Whether a run that has crashed and will be restarted by itself counts as `restarting`.
    """
    status = _status(paths, now, tail)
    if guarded and status in (Status.failed, Status.crashed) and (guard := read_guard(paths)) and guard.alive:
        return _unless_stopping(paths, Status.restarting)
    return status


def _status(paths: RunPaths, now: float | None, tail: LogEnd | None) -> Status:
    worker, launched = read_mark(paths.process), read_mark(paths.launch)
    # Before the log: on a resume it still ends with the earlier worker's last event until the new one has begun.
    if launched is not None and _nothing_since(launched, paths.events) and is_alive(launched[0]):
        return _unless_stopping(paths, Status.starting)
    # Before the log too: of a resumed run that waits in the queue it ends with the earlier worker's last event.
    if requested(paths, "queued") and _worked_on(paths, worker):
        return _unless_stopping(paths, Status.queued)
    tail = tail or log_tail(paths.events)
    end = tail.last(Failed, Finished, Started)
    if isinstance(end, Finished):
        return Status.stopped if end.outcome == "stopped" else Status.finished
    if isinstance(end, Failed):
        return Status.failed
    if _worked_on(paths, worker):
        return _live_status(paths, tail)
    never_launched = not tail.data and worker is None and launched is None
    moment = time.time() if now is None else now
    # `abs`, because a clock may be set back: the folder would count as starting, and could not be removed, until the
    # clock has caught up.
    just_made = abs(moment - _made_at(paths)) < _MOMENT_SECONDS
    return _unless_stopping(paths, Status.starting) if never_launched and just_made else Status.crashed


def _worked_on(paths: RunPaths, worker: tuple[ProcessMark, dict[str, Any]] | None) -> bool:
    """Whether a worker lives that holds the run.

    A child process inherits the lock and may hold it after the worker was killed; no events come from it.
    """
    worker_dead = worker is not None and is_here(worker[0]) and not is_alive(worker[0])
    return lock_held(paths.lock) and not worker_dead


def _live_status(paths: RunPaths, tail: LogEnd) -> Status:
    mark = tail.last(Paused, Started)
    if isinstance(mark, Paused) and mark.paused:
        return _unless_stopping(paths, Status.paused)
    return _unless_stopping(paths, Status.running if tail.data else Status.starting)


def _unless_stopping(paths: RunPaths, live: Status) -> Status:
    """Return the status of a run that lives, but for one that was asked to stop: even its start may take a minute."""
    return Status.stopping if requested(paths, "stop") else live


def _nothing_since(launched: tuple[ProcessMark, dict[str, Any]], events: Path) -> bool:
    """Whether the log has not grown since the launch, so that its last events are those of an earlier worker."""
    before = launched[1].get("events_bytes")
    return isinstance(before, int) and file_bytes(events) <= before


def file_bytes(path: Path) -> int:
    """Return the length of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _made_at(paths: RunPaths) -> float:
    try:
        return paths.root.stat().st_mtime
    except OSError:
        return 0.0
