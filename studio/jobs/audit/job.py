"""One audit from its request to its report."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.events import Finished, Started, Warned
from studio.jobs.audit.kept import KeptPart
from studio.jobs.audit.report import write_report
from studio.jobs.base.failures import Cancelled
from studio.probe.device import other_card_note
from studio.runs.audit_request import WHAT, AuditRequest
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker

_AUDITS = {
    "base": ("studio.jobs.audit.base_audit", "audit_base"),
    "run": ("studio.jobs.audit.run_audit", "audit_adapter"),
    "race": ("studio.jobs.audit.race", "audit_race"),
}
_BEYOND = {
    "answers": ("studio.jobs.audit.answers", "audit_answers"),
    "lm_eval": ("studio.jobs.audit.lm_eval", "audit_tasks"),
}


def audit_run(worker: Worker, request: AuditRequest) -> None:
    """Measure as asked and leave `report.json` and `report.md`.

    Raises:
        BadInput: Something that is named in the request cannot be used.
        JobFailed: The model cannot be measured.
    """
    worker.emit(Started, job="audit", method=request.what, model=request.model or None)
    if request.run and (note := other_card_note(RunPaths(Path(request.run)))):
        worker.emit(Warned, topic="card", message=note)
    if request.what not in _AUDITS:
        raise BadInput(f"an audit of the kind {request.what!r} is not known here; wanted one of {', '.join(WHAT)}.")
    module, name = _AUDITS[request.what]
    try:
        report = _measured(worker, request, getattr(importlib.import_module(module), name))
        report |= _beyond_loss(worker, request)
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
        return
    write_report(worker, report)
    shutil.rmtree(worker.paths.audit_parts, ignore_errors=True)
    worker.emit(Finished, outcome="done", result={"report": worker.paths.report.name, "what": request.what})


def _measured(worker: Worker, request: AuditRequest, audit: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Return the report on losses; where more follows it is kept meanwhile, since that may be stopped."""
    if not _wanted(request):
        return audit(worker, request)
    kept = KeptPart(worker, request, "measured")
    report: dict[str, Any] = kept.load() or audit(worker, request)
    kept.keep(report)
    return report


def _beyond_loss(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Return what is measured of a run besides losses; what cannot be is said and costs nothing else."""
    more: dict[str, Any] = {}
    for part, module, name in _wanted(request):
        try:
            more[part] = getattr(importlib.import_module(module), name)(worker, request)
        except Cancelled:
            raise
        except StudioError as error:
            more[part] = {"why_not": str(error)}
            worker.emit(Warned, topic="audit", message=f"{part.replace('_', '-')} left out: {error}")
    return more


def _wanted(request: AuditRequest) -> list[tuple[str, str, str]]:
    """Return part, module and function of what is asked for besides losses."""
    asked = {"answers": request.answers, "lm_eval": request.lm_eval} if request.what == "run" else {}
    return [(part, *_BEYOND[part]) for part, wanted in asked.items() if wanted]
