"""One audit from its request to its report."""

import importlib
import shutil
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.events import Finished, Started
from studio.jobs.audit.report import write_report
from studio.jobs.audit.stopped import Stopped
from studio.runs.audit_request import WHAT, AuditRequest
from studio.runs.worker import Worker

_AUDITS = {
    "base": ("studio.jobs.audit.base_audit", "audit_base"),
    "run": ("studio.jobs.audit.run_audit", "audit_adapter"),
    "race": ("studio.jobs.audit.race", "audit_race"),
}


def audit_run(worker: Worker, request: AuditRequest) -> None:
    """Measure as asked and leave `report.json` and `report.md`.

    Raises:
        BadInput: Something that is named in the request cannot be used.
        JobFailed: The model cannot be measured.
    """
    worker.emit(Started, job="audit", method=request.what, model=request.model or None)
    if request.what not in _AUDITS:
        raise BadInput(f"an audit of the kind {request.what!r} is not known here; wanted one of {', '.join(WHAT)}.")
    module, name = _AUDITS[request.what]
    try:
        report = getattr(importlib.import_module(module), name)(worker, request)
    except Stopped:
        worker.emit(Finished, outcome="stopped")
        return
    write_report(worker, report)
    shutil.rmtree(Path(worker.paths.root) / "audit", ignore_errors=True)
    worker.emit(Finished, outcome="done", result={"report": worker.paths.report.name, "what": request.what})
