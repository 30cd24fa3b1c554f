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
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from filelock import FileLock, Timeout

from studio.core.errors import JobFailed, StudioError
from studio.core.events import Failed, Finished, Paused, Phase, RunEvent, Started, StepDone, Warned
from studio.core.text import plain
from studio.runs.atomic import mend_folder, write_whole
from studio.runs.control import Request, asked_at, leave_request, requested, withdraw
from studio.runs.disk import DISK_FULL, RESUME, Reserve, disk_failure, refuses
from studio.runs.failure import Doing, Explain, failure_of, not_explained
from studio.runs.layout import RunPaths
from studio.runs.log import EventWriter
from studio.runs.memory_kills import MEMORY_KILLS, kill_counts
from studio.runs.process import mark_of, mark_to_json

_LOCK_WAIT_SECONDS = 2.0
_POLL_SECONDS = 0.2
_ROOM_POLLS = 10
"""Looks for a stop between two tries of a disk that refuses: it is tried again every two seconds."""

_Made = TypeVar("_Made")


class RunBusy(StudioError):
    """Another worker holds the run."""


@dataclass(slots=True)
class _Wait:
    """A wait for a disk that refuses.

    Attributes:
        why: What the disk said.
        stop_before: When a stop had been asked for before the wait, None for none: only a new one ends the wait.
        signalled_before: Whether a signal had asked for one before.
        told: Whether the log says that the run waits.
    """

    why: str
    stop_before: int | None
    signalled_before: bool
    told: bool = False


class Worker:
    """Context in which a job does its work.

    Attributes:
        paths: The run.
        exit_code: What the process should exit with: 0 done or stopped on request, 1 anything else.
        patient: Whether the job waits for room, with all that it has in memory, when the disk refuses an event; else it
            fails. For jobs that would lose hours.
        sleep: Waits between two tries.
        told: How many events were written.
        waits: Whether the last that it told is that it is paused.
        step_seconds: How long the last steps of a training took.
        listeners: Called with each event once it is written, in the thread that told it. They may tell more; an
            exception of theirs is printed, and does not reach the job.
        looks: Called every few seconds by the watchdog of a training, in its thread.
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
            wait_seconds: How long to wait for the lock: whoever looks whether it is held takes it for an instant.
        """
        self.paths = paths
        self.exit_code = 1
        self._clock = clock
        self._explain = explain
        # Not thread-local: an event may be written, and the lock be asked for, by any thread of the job.
        self._lock = FileLock(paths.lock, timeout=wait_seconds, mode=0o600, thread_local=False)
        self.patient = False
        self.sleep: Callable[[float], None] = time.sleep
        self.told, self.waits = 0, False
        self.step_seconds: deque[float] = deque(maxlen=20)
        self.listeners: list[Callable[[RunEvent], None]] = []
        self.looks: list[Callable[[], None]] = []
        self._reserve = Reserve(paths.reserve)
        # Reentrant, because writing an event that must wait for the disk writes the events that tell of the wait.
        self._writing = threading.RLock()
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
                known = {"cwd": str(Path.cwd()), "taken_at": self._clock(), MEMORY_KILLS: kill_counts()}
                write_whole(self.paths.process, mark_to_json(mark, **known))
            self._log = EventWriter(self.paths.events, self._clock)
            mend_folder(self.paths.adapter)
            self._reserve.fill()
        except BaseException:
            self._lock.release()
            raise
        self._signals.catch()
        with suppress(OSError, ValueError):
            # A fault in native code ends a process without a word; this leaves a traceback in output.log.
            faulthandler.enable()
        return self

    @property
    def doing(self) -> Doing:
        """What the job told last that it is doing."""
        return self._doing

    def emit(self, kind: type[RunEvent], **fields: Any) -> None:
        """Write an event of this kind, stamped with the time.

        Raises:
            JobFailed: The disk is full, and the job is not patient or was stopped while it waited.
        """
        event = kind(at=self._clock(), **fields)
        with self._writing:
            # A failure is never waited with: the process is about to end, and the reserve has room for its line.
            if self.patient and not isinstance(event, Failed):
                self._write_patiently(event)
            else:
                self._log.write(event)
        self.told += 1
        self.waits = isinstance(event, Paused) and event.paused
        if isinstance(event, StepDone):
            self.step_seconds.append(event.seconds)
        self._step = getattr(event, "step", None) or self._step
        if isinstance(event, Started):
            self._doing = Doing(job=event.job)
        elif isinstance(event, Phase):
            self._doing = replace(self._doing, phase=event.name)
        if isinstance(event, (Failed, Finished)):
            self._ended = True
            self.exit_code = 0 if isinstance(event, Finished) else 1
        for listener in self.listeners:
            try:
                listener(event)
            except JobFailed:  # the disk refused what it told, and the user stopped the run
                raise
            except Exception as error:  # noqa: BLE001  whatever fails in looking at a run must not end it
                _print_traceback(error)

    @property
    def last_step(self) -> int:
        """The last step that was told of."""
        return self._step or 0

    def patiently(self, trouble: str, attempt: Callable[[], _Made]) -> _Made:
        """Repeat an attempt until the disk lets it through, and return its result.

        While the disk refuses, the log says that the run waits. A stop that is asked for meanwhile ends the job, and
        what could not be written is lost.

        Args:
            trouble: What cannot be done, for the message.
            attempt: Leaves nothing half-made when it fails.

        Raises:
            JobFailed: The user stopped it while it waited.
        """
        made, waited = self._tried(trouble, lambda waited: attempt())
        if waited:
            self.emit(Paused, step=self._step or 0, paused=False)
        return made

    def _write_patiently(self, event: RunEvent) -> None:
        """Write an event; after a wait, with the line before it that the run goes on.

        It stands before because nothing may follow a `Failed` or `Finished`.
        """

        def write(waited: bool) -> None:
            goes_on = (Paused(at=self._clock(), step=self._step or 0, paused=False),) if waited else ()
            self._log.write_all((*goes_on, event))

        self._tried("the run's log cannot be written", write)

    def _tried(self, trouble: str, attempt: Callable[[bool], _Made]) -> tuple[_Made, bool]:
        """Repeat an attempt until the disk lets it through; return its result, and whether it had to wait.

        The lines that tell of the wait may have used the reserve. The next try comes when there is room for all of the
        reserve again: with room for a line or two the run would go on, and stop again at once.
        """
        wait: _Wait | None = None
        while True:
            try:
                return attempt(wait is not None), wait is not None
            except Exception as error:
                if not refuses(error):
                    raise
                wait = wait or _Wait(self._why(error), asked_at(self.paths, "stop"), self._signals.asked)
            self._wait(wait, trouble)
            while not self._reserve.fill():
                self._wait(wait, trouble)

    def _wait(self, wait: "_Wait", trouble: str) -> None:
        """Say that the run waits, if it is not said yet, and sleep.

        Raises:
            JobFailed: The user asked for a stop since.
        """
        if not wait.told:
            wait.told = self._say_waiting(wait.why, trouble)
        for _ in range(_ROOM_POLLS):
            self.sleep(_POLL_SECONDS)
            asked = self.requested("stop")
            new = asked_at(self.paths, "stop") != wait.stop_before or self._signals.asked != wait.signalled_before
            if asked and new:
                raise JobFailed(
                    DISK_FULL, f"stopped while it waited for its disk: {wait.why}; {trouble}",
                    f"free some space; {RESUME} goes on after the last checkpoint",
                )  # fmt: skip

    def _why(self, error: Exception) -> str:
        cause = error.__cause__ if isinstance(error, StudioError) and error.__cause__ else error
        return str(disk_failure(cause, place=self.paths.root) or error)

    def _say_waiting(self, why: str, trouble: str) -> bool:
        """Write that the run waits, and return whether the log took both lines.

        It may not: on a very full disk another program can take the room that the reserve gave back.
        """
        advice = (
            "Free some space, or make it writable: it goes on by itself. Stopping the run gives up what is not saved"
        )
        message = f"{why}; {trouble}. The run waits with all that it has in memory. {advice}"
        lines = (Warned(at=self._clock(), topic="disk", message=message),
                 Paused(at=self._clock(), step=self._step or 0, paused=True, reason=why))  # fmt: skip
        with self._writing:
            for give in (None, self._reserve.give_half):
                if give is not None:
                    give()
                try:
                    self._log.write_all(lines)
                except (OSError, StudioError):
                    continue
                self.waits = True
                return True
        return False

    def requested(self, what: Request) -> bool:
        """Return whether the user asks for this.

        Raises:
            JobFailed: The run's folder was deleted: nobody waits for the job any more, and it could not save.
        """
        if requested(self.paths, what) or (what == "stop" and self._signals.asked):
            return True
        if not self.paths.root.is_dir():
            raise JobFailed("folder_gone", "the run's folder was deleted or moved while it ran", "")
        return False

    def served(self, what: Request) -> None:
        """Say that a request was fulfilled."""
        withdraw(self.paths, what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Record how the job ended and release the run; no exception leaves the context."""
        # A second Ctrl-C must not interrupt the last event, or the run would look crashed.
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
            self._reserve.give_all()
            self._log.close()
            self._lock.release()
        return True

    def _fail(self, error: BaseException | None) -> None:
        """Record a failure.

        The traceback is printed first, so that whoever sees the failure finds it. On a full disk the event goes first:
        there may be room for nothing else.
        """
        failure = failure_of(error, self._explain, self._doing)
        self.exit_code = 1
        self._reserve.give_all()
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


def _print_traceback(error: BaseException | None) -> None:
    """Print a traceback, where the disk takes it: that it cannot be printed must not hide the error itself."""
    if error is not None:
        with suppress(OSError):
            traceback.print_exception(error)


_NAMES = [name for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name)]


class StopOnSignal:
    """Turns SIGTERM and SIGINT into a stop request; where a stop was asked for already, into `KeyboardInterrupt`.

    Attributes:
        asked: Whether a signal asked for a stop. Kept in memory too: a full disk may not take the request's file.
    """

    def __init__(self, paths: RunPaths) -> None:
        self.asked = False
        self._paths = paths
        self._before: dict[int, Any] = {}

    def catch(self) -> None:
        """Take the handlers; outside the main thread, where Python allows none, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _NAMES:
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._on_signal)
        if hasattr(signal, "SIGHUP"):  # sent when the terminal is closed or the SSH line drops: the run lives on
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def ignore(self) -> None:
        """Let nothing interrupt the worker's last words."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or requested(self._paths, "stop"):
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):
            leave_request(self._paths, "stop")
