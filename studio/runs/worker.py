"""The worker's side of a run: lock, identity, event log, and an honest end whatever happens in between.

    with Worker(RunPaths(Path(sys.argv[1]))) as worker:
        worker.emit(Started, job="train")
        ...
        worker.emit(Finished, outcome="done")
    sys.exit(worker.exit_code)

An exception in the body becomes a `Failed` event and exit code 1; its traceback goes to stderr, which is `output.log`.
"""

import faulthandler
import os
import secrets
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from studio.core.errors import JobFailed, StudioError
from studio.core.events import Failed, Finished, Phase, RunEvent, Started
from studio.core.text import plain
from studio.runs.atomic import mend_folder, write_whole
from studio.runs.control import Request, requested, withdraw
from studio.runs.disk import DISK_FULL
from studio.runs.failure import Doing, Explain, failure_of, not_explained
from studio.runs.layout import RunPaths
from studio.runs.log import EventWriter
from studio.runs.process import mark_of, mark_to_json
from studio.runs.signals import StopOnSignal

_LOCK_WAIT_SECONDS = 2.0
_RESERVE_BYTES = 32 * 1024


class RunBusy(StudioError):
    """Another worker holds the run."""


class Worker:
    """Context in which a job does its work.

    Attributes:
        paths: The run.
        exit_code: What the process should exit with: 0 done or stopped on request, 1 anything else.
    """

    def __init__(
        self,
        paths: RunPaths,
        *,
        clock: Callable[[], float] = time.time,
        explain: Explain = not_explained,
        wait_seconds: float = _LOCK_WAIT_SECONDS,
    ) -> None:
        """Prepare to take a run; nothing is touched yet.

        Args:
            paths: The run; its folder exists.
            clock: Unix seconds.
            explain: Names the errors of the job's libraries.
            wait_seconds: How long to wait for the lock: someone may just be looking whether it is held.
        """
        self.paths = paths
        self.exit_code = 1
        self._clock = clock
        self._explain = explain
        # Not thread-local: an event may be written, and the lock be asked for, by any thread of the job.
        self._lock = FileLock(paths.lock, timeout=wait_seconds, mode=0o600, thread_local=False)
        self._reserve = paths.root / ".reserve"
        self._step: int | None = None
        self._doing = Doing()
        self._ended = False
        self._signals = StopOnSignal(paths)

    def __enter__(self) -> Self:
        """Take the run.

        Raises:
            RunBusy: Another worker holds it.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            name = plain(self.paths.name, one_line=True)
            raise RunBusy(f"the run {name} already has a worker; attach to it, or stop it first") from error
        try:
            mark = mark_of(os.getpid())
            if mark is not None:
                write_whole(self.paths.process, mark_to_json(mark, cwd=str(Path.cwd()), taken_at=self._clock()))
            self._log = EventWriter(self.paths.events, self._clock)
            mend_folder(self.paths.adapter)
            self._keep_reserve()
        except BaseException:
            self._lock.release()
            raise
        self._signals.catch()
        with suppress(OSError, ValueError):
            # A fault in native code ends a process without a word; this leaves a traceback in output.log.
            faulthandler.enable()
        return self

    def emit(self, kind: type[RunEvent], **fields: Any) -> None:
        """Write an event of this kind, stamped with the time.

        Raises:
            JobFailed: The disk is full.
        """
        event = self._log.emit(kind, **fields)
        self._step = getattr(event, "step", None) or self._step
        if isinstance(event, Started):
            self._doing = Doing(job=event.job)
        elif isinstance(event, Phase):
            self._doing = replace(self._doing, phase=event.name)
        if isinstance(event, (Failed, Finished)):
            self._ended = True
            self.exit_code = 0 if isinstance(event, Finished) else 1

    def requested(self, what: Request) -> bool:
        """Return whether the user asks for this.

        Raises:
            JobFailed: The run's folder was deleted: there is nobody left to work for, and nowhere to save.
        """
        if requested(self.paths, what):
            return True
        if not self.paths.root.is_dir():
            raise JobFailed("folder_gone", "the run's folder was deleted while it ran", "")
        return False

    def served(self, what: Request) -> None:
        """Say that a request was fulfilled."""
        withdraw(self.paths, what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Record how the job ended and give the run free; no exception leaves the context."""
        self._signals.ignore()
        try:
            if error is not None:
                self.exit_code = 1
            if self._ended:
                _print_traceback(error)
            else:
                self._fail(error)
        finally:
            self._signals.restore()
            self._reserve.unlink(missing_ok=True)
            self._log.close()
            self._lock.release()
        return True

    def _fail(self, error: BaseException | None) -> None:
        """Who sees the failure finds the traceback; on a full disk the one line that must fit goes first."""
        failure = failure_of(error, self._explain, self._doing)
        self.exit_code = 1
        self._reserve.unlink(missing_ok=True)
        full = failure.kind == DISK_FULL
        if not full:
            _print_traceback(error)
        self._record(failure)
        if full:
            _print_traceback(error)

    def _record(self, failure: JobFailed) -> None:
        fields = {"failure": failure.kind, "message": str(failure), "advice": failure.advice, "step": self._step}
        try:
            self.emit(Failed, **fields)
        except (OSError, StudioError) as error:
            _print_traceback(error)

    def _keep_reserve(self) -> None:
        """Random bytes, so that a compressing file system sets the room aside too; a full disk has none."""
        with suppress(OSError):
            self._reserve.touch(mode=0o600)
            self._reserve.write_bytes(secrets.token_bytes(_RESERVE_BYTES))


def run_job(run: Path, body: Callable[[Worker], None], *, explain: Explain = not_explained) -> int:
    """Run a job's body as the worker of a run and return the exit code of its process; a busy run is refused with 1."""
    worker = Worker(RunPaths(run.absolute()), explain=explain)
    try:
        with worker:
            body(worker)
    except (RunBusy, OSError) as error:
        _print_traceback(error)
        return 1
    return worker.exit_code


def _print_traceback(error: BaseException | None) -> None:
    """The output is on the same disk as the log: that it cannot be written either must not hide the error."""
    if error is not None:
        with suppress(OSError):
            traceback.print_exception(error)
