"""Which process a run belongs to, recorded so that neither a reused pid nor another machine is mistaken for it."""

import json
import os
import platform
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LINUX = sys.platform.startswith("linux")


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """What identifies a process: no other one, here or elsewhere, has the same four values.

    Attributes:
        pid: Its number.
        started: When it started: on Linux clock ticks since boot (a corrected wall clock cannot move them), elsewhere
            unix seconds.
        boot: The machine's boot, so that a number from before a restart matches nothing.
        host: The machine's name, so that a copied run directory never points at a process here.
    """

    pid: int
    started: float
    boot: str
    host: str


def mark_of(pid: int) -> ProcessMark | None:
    """Return the mark of a living process of this machine, None where there is none (a zombie has ended)."""
    started = _started(pid)
    return None if started is None else ProcessMark(pid, started, _boot(), platform.node())


def is_here(mark: ProcessMark) -> bool:
    """Return whether the process is, or was, one of this machine."""
    return mark.host == platform.node()


def of_this_boot(mark: ProcessMark) -> bool:
    """Return whether the process is, or was, one of this machine since it was started last."""
    return is_here(mark) and mark.boot == _boot()


def is_alive(mark: ProcessMark) -> bool:
    """Return whether exactly this process lives here and now."""
    return is_here(mark) and mark_of(mark.pid) == mark


def send_signal(mark: ProcessMark, number: signal.Signals) -> bool:
    """Send a signal to exactly this process; return whether it was there to receive it."""
    if not is_alive(mark):
        return False
    try:
        # Between the look and the signal the process may end and its pid go to another one; a pidfd rules that out.
        if _LINUX and hasattr(os, "pidfd_open"):
            return _signal_by_descriptor(mark, number)
        os.kill(mark.pid, number)
    except ProcessLookupError:
        return False
    return True


def mark_to_json(mark: ProcessMark, **more: Any) -> str:
    """Return the text of `process.json` or `launch.json`: the mark and what else the writer knows."""
    return json.dumps({**asdict(mark), **more}, indent=1) + "\n"


def read_mark(path: Path) -> tuple[ProcessMark, dict[str, Any]] | None:
    """Return the mark in a file and all of its fields; None where the file is missing or not ours."""
    try:
        table = json.loads(path.read_bytes())
        mark = ProcessMark(int(table["pid"]), float(table["started"]), str(table["boot"]), str(table["host"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return mark, table


def _signal_by_descriptor(mark: ProcessMark, number: signal.Signals) -> bool:
    """Signal through a descriptor, and look again after it was taken: unlike a pid it never means another process."""
    descriptor = os.pidfd_open(mark.pid)
    try:
        if not is_alive(mark):
            return False
        signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)
    return True


def _started(pid: int) -> float | None:
    if pid <= 0:
        return None
    if _LINUX:
        return _started_ticks(pid)
    import psutil  # noqa: PLC0415  20 ms that Linux does not need

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _started_ticks(pid: int) -> float | None:
    """Field 22 of proc(5) stat; the name in field 2 may hold spaces and brackets, hence the cut at the last one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else float(fields[19])


def _boot() -> str:
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except OSError:
        import psutil  # noqa: PLC0415  as above

        return str(round(psutil.boot_time()))
