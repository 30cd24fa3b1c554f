"""One audit from its request to its report."""

import shutil
import time
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.events import Finished, Started, Warned
from studio.jobs.audit.lanes import train_lanes
from studio.jobs.audit.report import write_report
from studio.jobs.base.failures import Cancelled
from studio.probe.device import other_card_note
from studio.runs.layout import RunPaths
from studio.runs.requests import WHAT, AuditRequest
from studio.runs.worker import Worker


def audit_run(worker: Worker, request: AuditRequest) -> None:
    """Measure as asked and write `report.json` and `report.md`.

    Raises:
        BadInput: Something that the request names cannot be used.
        JobFailed: The model cannot be measured.
    """
    worker.emit(Started, job="audit", method=request.what, model=request.model or None)
    if request.run and (note := other_card_note(RunPaths(Path(request.run)))):
        worker.emit(Warned, topic="card", message=note)
    try:
        report = _audited(worker, request)
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
        return
    write_report(worker, report)
    shutil.rmtree(worker.paths.audit_parts, ignore_errors=True)
    worker.emit(Finished, outcome="done", result={"report": worker.paths.report.name, "what": request.what})


def _audited(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Return the report of one kind of audit.

    torch and modules that import it are imported only when they are needed: they take 0.4 GB of memory, which a race
    does not need while its lanes train.
    """
    match request.what:
        case "base":
            from studio.jobs.audit.base_audit import audit_base  # noqa: PLC0415

            return audit_base(worker, request)
        case "run":
            from studio.jobs.audit.run_audit import audit_adapter  # noqa: PLC0415

            return audit_adapter(worker, request)
        case "race":
            began = time.perf_counter()
            lanes = train_lanes(worker, request)
            from studio.jobs.audit.race import audit_race  # noqa: PLC0415

            return audit_race(worker, request, lanes, began)
    raise BadInput(f"an audit of the kind {request.what!r} is not known here; wanted one of {', '.join(WHAT)}.")
