"""One audit from its request to its report."""

import shutil
from pathlib import Path

import transformers

from studio.core.errors import BadInput
from studio.core.events import Finished, Started
from studio.jobs.audit.base_audit import audit_base
from studio.jobs.audit.report import write_report
from studio.jobs.audit.run_audit import audit_adapter
from studio.jobs.audit.walk import Stopped
from studio.runs.audit_request import WHAT, AuditRequest
from studio.runs.worker import Worker


def audit_run(worker: Worker, request: AuditRequest) -> None:
    """Measure as asked and leave `report.json` and `report.md`.

    Raises:
        BadInput: Something that is named in the request cannot be used.
        JobFailed: The model cannot be measured.
    """
    worker.emit(Started, job="audit", method=request.what, model=request.model or None)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    audits = {"base": audit_base, "run": audit_adapter}
    if request.what not in audits:
        raise BadInput(f"an audit of the kind {request.what!r} is not known here; wanted one of {', '.join(WHAT)}.")
    try:
        report = audits[request.what](worker, request)
    except Stopped:
        worker.emit(Finished, outcome="stopped")
        return
    write_report(worker, report)
    shutil.rmtree(Path(worker.paths.root) / "audit", ignore_errors=True)
    worker.emit(Finished, outcome="done", result={"report": worker.paths.report.name, "what": request.what})
