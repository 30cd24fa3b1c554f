"""Starting, stopping and continuing the process of a run. The process outlives whoever started it.

Own session, stdin from the null device and output into a file: each of the three is needed for a child to survive a
closed terminal and a killed parent (measured: a pipe or an inherited terminal kills it).
"""

import os
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.control import leave_request, request, withdraw_all
from studio.runs.extension import has_steps_left
from studio.runs.last_words import memory_kills
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.process import mark_of, mark_to_json, read_mark, send_signal
from studio.runs.status import Status, file_bytes, run_status

ENVIRONMENT = {
    "WANDB_MODE": "disabled",  # its login prompt hangs a process without a terminal
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",  # output.log is read while the job lives
    "PYTHONSAFEPATH": "1",  # a torch.py in the current folder must not become the library
    "TOKENIZERS_PARALLELISM": "false",
    # OpenMP's threads spin while they wait for each other; with one core busy elsewhere an evaluation took 44 s, not 7.
    "OMP_WAIT_POLICY": "PASSIVE",
}
ASKED_WANDB_MODE = "LORA_STUDIO_WANDB_MODE"
"""Holds for a tracker's process what WANDB_MODE is where the job was started."""
_CHILDREN: "dict[Path, subprocess.Popen[bytes]]" = {}
"""The last process that was started here for each run, so that its exit status can be collected."""
_GUARD = "studio.launch.guard"
_COUNTED = ", and has counted such a kill since the process began"
_NOT_COUNTED = (
    ", but has counted no such kill: someone (kill -9), a batch system at a limit, or a guard of the memory such as "
    "earlyoom or systemd-oomd may have ended it"
)
_POLL_SECONDS = 0.05
_TERM_SECONDS = 10.0
"""How long a worker may take after SIGTERM, before SIGKILL."""
_KILL_SECONDS = 10.0
"""How long the system may take to end a process after SIGKILL."""


@dataclass(frozen=True, slots=True)
class Handle:
    """A launched run: its folder and the process as its parent sees it (needed to reap it)."""

    paths: RunPaths
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """The number of the started process."""
        return self.process.pid


def launch(
    paths: RunPaths,
    module: str,
    *,
    popen: Callable[..., "subprocess.Popen[bytes]"] = subprocess.Popen,
    environment: Mapping[str, str] | None = None,
    wait_seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Handle:
    """Start `python -m module RUN` as the worker of a run; return when it holds the run, has ended, or time is up.

    Args:
        paths: The run; its folder exists.
        module: The job's module.
        popen: Starts the process.
        environment: Additions to the child's environment, over ours.
        wait_seconds: Longest wait for the worker's lock; the child is left alone after it.
        clock: Seconds, for the wait.
        sleep: Waits between two looks.

    Raises:
        StudioError: The run has a worker already, or the process cannot be started.
    """
    if lock_held(paths.lock):
        raise StudioError(f"the run {plain(paths.name, one_line=True)} already has a worker; attach to it or stop it.")
    before, printed = file_bytes(paths.events), file_bytes(paths.output)
    command = [sys.executable, "-m", module, str(paths.root.absolute())]
    process = _detached(paths, command, environment, "the worker", popen)
    mark = mark_of(process.pid)
    # The run works without this file, though less is known of its start. That the disk is full need not be told here:
    # the worker will meet it too, and tell it.
    with suppress(OSError):
        if mark is not None:
            write_whole(paths.launch, mark_to_json(mark, events_bytes=before, output_bytes=printed, module=module))
    handle = Handle(paths, process)
    _CHILDREN[paths.root.absolute()] = process
    _until(lambda: _taken_by(handle) or process.poll() is not None, wait_seconds, clock, sleep)
    return handle


def stop(
    paths: RunPaths,
    grace_seconds: float | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Status:
    """Ask a worker to stop in order; with a grace period, end it by SIGTERM and SIGKILL when that has passed.

    Signals go to exactly the process that took the run on this machine, never to another one with its number.

    Args:
        paths: The run.
        grace_seconds: How long the worker may take (a step, and saving); None only asks and returns at once.
        clock: Seconds, for the waits.
        sleep: Waits between two looks.

    Returns:
        How the run stands afterwards.
    """
    if not run_status(paths).live:
        return run_status(paths)
    request(paths, "stop")
    if grace_seconds is None:
        return run_status(paths)

    def gone() -> bool:
        return not run_status(paths).live and not lock_held(paths.lock)

    waits = ((grace_seconds, signal.SIGTERM), (_TERM_SECONDS, getattr(signal, "SIGKILL", signal.SIGTERM)))
    for seconds, number in waits:
        if _until(gone, seconds, clock, sleep):
            return run_status(paths)
        worker = read_mark(paths.process) or read_mark(paths.launch)
        if worker is not None:
            send_signal(worker[0], number)
    _until(gone, _KILL_SECONDS, clock, sleep)
    return run_status(paths)


def resume(
    paths: RunPaths,
    *,
    module: str,
    from_start: bool = False,
    step: int | None = None,
    before: Callable[[], None] | None = None,
    **options: Any,
) -> Handle:
    """Start a worker in the folder of a run that was stopped, failed or crashed, whatever it finds there.

    Args:
        paths: The run.
        module: The job's module.
        from_start: Whether training may start over where no checkpoint is whole.
        step: The step of the checkpoint after which it goes on; None for the newest whole one.
        before: Called when earlier requests are withdrawn and before the process is started.
        options: As for `launch`.

    Raises:
        BadInput: The run is live or finished.
        StudioError: The process cannot be started.
    """
    refuse_unless_ended(paths, back=step is not None)
    withdraw_all(paths)
    if from_start:
        request(paths, "from-start")
    if step is not None:
        leave_request(paths, "from-checkpoint", str(step))
    if before is not None:
        before()
    return launch(paths, module, **options)


def start_guard(paths: RunPaths, times: int, module: str = "", environment: Mapping[str, str] | None = None) -> None:
    """Start the process that resumes a run by itself after a crash; it outlives whoever started it.

    Args:
        paths: The run, which has a worker.
        times: How often it may be restarted.
        module: The job's module; empty takes that of its kind.
        environment: Additions to the environment, over ours.

    Raises:
        StudioError: The process cannot be started.
    """
    command = [sys.executable, "-m", _GUARD, str(paths.root.absolute()), str(times), *([module] if module else [])]
    _detached(paths, command, environment, "what restarts the run after a crash", subprocess.Popen)


def refuse_unless_ended(paths: RunPaths, *, back: bool = False) -> None:
    """Refuse to resume a run whose worker lives, or that has nothing left to do because it finished.

    Args:
        paths: The run.
        back: Whether it goes back to a checkpoint, which a finished one may too.

    Raises:
        BadInput: It is so.
    """
    status = run_status(paths, guarded=False)
    name = plain(paths.name, one_line=True)
    if status.live or lock_held(paths.lock):
        raise BadInput(
            f"the run {name} is {status}: it cannot be resumed while its worker lives. Attach to it instead."
        )
    if status is Status.finished and not back and not has_steps_left(paths):
        raise BadInput(
            f"the run {name} is finished: there is nothing left to do. Let it train longer with lora-studio runs "
            f"extend {name}, or start a new run from its recipe.toml."
        )


def how_it_ended(paths: RunPaths) -> str:
    """Return how the run's process ended, in words; empty where it lives, ended in order, or was not started here."""
    process = _CHILDREN.get(paths.root.absolute())
    code = process.poll() if process else None
    if not code:
        return ""
    if code > 0:
        return f"its process ended with exit code {code}"
    name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
    if name != "SIGKILL":
        return f"its process was ended by {name}"
    counted = memory_kills(paths)
    more = "" if counted is None else _COUNTED if counted else _NOT_COUNTED
    return f"its process was ended by SIGKILL; the system does that when its memory is full{more}"


def child_environment(additions: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `ENVIRONMENT`, the additions, and a path to this very package."""
    environment = {**os.environ, **ENVIRONMENT, **additions}
    if mode := os.environ.get("WANDB_MODE", ""):
        environment.setdefault(ASKED_WANDB_MODE, mode)
    parent = str(Path(__file__).resolve().parents[2])
    # A checkout does not lie where Python looks for packages, and the child does not run in the checkout's folder.
    if parent not in (*site.getsitepackages(), site.getusersitepackages()):
        known = [str(Path(path).absolute()) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*known, parent]))
    return environment


def _detached(
    paths: RunPaths,
    command: Sequence[str],
    environment: Mapping[str, str] | None,
    what: str,
    popen: Callable[..., "subprocess.Popen[bytes]"],
) -> "subprocess.Popen[bytes]":
    """Start a process of a run that outlives ours and prints into the run's folder; `what` it is, for the error."""
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS}
    descriptor = os.open(paths.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            close_fds=True,
            cwd=paths.root,
            env=child_environment(environment or {}),
            **apart,
        )
    except OSError as error:
        raise StudioError(f"{what} cannot be started: {error}") from error
    finally:
        os.close(descriptor)


def _taken_by(handle: Handle) -> bool:
    """Whether the launched process holds the run's lock.

    On Windows any worker counts: a virtual environment there starts Python as a second process, with another pid.
    """
    if not lock_held(handle.paths.lock):
        return False
    worker = read_mark(handle.paths.process)
    return worker is not None and (worker[0].pid == handle.pid or sys.platform == "win32")


def _until(
    done: Callable[[], bool], seconds: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> bool:
    end = clock() + seconds
    while not done():
        if clock() >= end:
            return False
        sleep(_POLL_SECONDS)
    return True
