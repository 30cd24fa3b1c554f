"""What the audit screen asks of the rest of the program; a test gives its own.

Each import is made at the first use: together they cost 0.15 s that a studio without audits need not pay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.runs.audit_request import AuditRequest
from studio.runs.layout import RunPaths


def _start(request: AuditRequest, runs_root: Path) -> RunPaths:
    from studio.launch.start import start  # noqa: PLC0415  see above

    return start(request, runs_root)


def _read(paths: RunPaths) -> dict[str, Any] | None:
    from studio.probe.audit import read_report  # noqa: PLC0415

    return read_report(paths)


def _stop(paths: RunPaths) -> None:
    from studio.runs.control import request  # noqa: PLC0415

    request(paths, "stop")


def _copy(paths: RunPaths, folder: Path) -> list[Path]:
    from studio.probe.audit import copy_report  # noqa: PLC0415

    return copy_report(paths, folder)


@dataclass(frozen=True, slots=True)
class AuditEngine:
    """Functions.

    Attributes:
        start: Starts an audit in a folder of runs; raises StudioError.
        read: Reads a report; None where there is none.
        stop: Asks a running audit for an early end.
        copy: Copies a report's files to a folder and returns their paths; raises StudioError.
    """

    start: Callable[[AuditRequest, Path], RunPaths] = _start
    read: Callable[[RunPaths], dict[str, Any] | None] = _read
    stop: Callable[[RunPaths], None] = _stop
    copy: Callable[[RunPaths, Path], list[Path]] = _copy
