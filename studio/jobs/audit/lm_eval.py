"""Tasks of lm-eval (EleutherAI's harness) on the forms of a trained model, where the user has it installed.

Each form runs in a process of its own (`lm_eval_child.py`): the harness and what its tasks load end with it. What
comes back is a point for each document, so that forms are compared document by document.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio.core.answers import score_points
from studio.core.errors import JobFailed
from studio.core.events import Phase, Warned
from studio.jobs.audit.answer_models import AnswerModels, Form
from studio.jobs.audit.kept import KeptPart
from studio.jobs.audit.run_audit import recipe_of
from studio.jobs.base.progress import heed
from studio.probe.adapter_folder import find_adapter
from studio.probe.models import find_base
from studio.runs.audit_request import AuditRequest
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker

CHILD = "studio.jobs.audit.lm_eval_child"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_MEAN_GAP = 1e-6


def audit_tasks(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Run the tasks on every form and return what the report says of them.

    Raises:
        BadInput: The run or its base cannot be used.
        JobFailed: lm-eval is not installed, does not know a task, or ran on no form.
        Cancelled: The user asked for it; whole forms are kept.
    """
    if find_spec("lm_eval") is None:
        raise JobFailed(
            "no_lm_eval", "lm-eval is not installed in this Python", "pip install lm-eval, then resume this run"
        )
    models = models_of(request)
    forms = models.forms(request.merged)
    part = KeptPart(worker, request, "lm-eval")
    kept: dict[str, dict[str, Any]] = part.load() or {}
    for place, form in enumerate(forms):
        worker.emit(Phase, name="lm-eval", fraction=place / len(forms), detail=form.name)
        if form.name not in kept:
            kept[form.name] = _ran(worker, form)
            part.keep(kept)
        if why_not := kept[form.name].get("why_not"):
            worker.emit(Warned, topic="audit", message=f"lm-eval left out {form.name}: {why_not}")
    ran = {name: found for name, found in kept.items() if not found.get("why_not")}
    if not ran:
        reasons = {found["why_not"] for found in kept.values()}
        raise JobFailed("lm_eval", f"it ran on no form: {'; '.join(sorted(reasons))}", "its output is in output.log")
    reference = models.trained if models.trained in ran else next(iter(ran))
    return {
        "version": ran[reference]["version"],
        "reference": reference,
        "trained": models.trained,
        "limit": request.lm_eval_limit,
        "forms": [
            {"name": form.name, "title": form.title, "why_not": kept[form.name].get("why_not", "")} for form in forms
        ],
        "rows": _rows({name: found["rows"] for name, found in ran.items()}, reference),
    }


def models_of(request: AuditRequest) -> AnswerModels:
    """Return the forms of the run that a request is about.

    Raises:
        BadInput: The run or its base cannot be used.
    """
    trained = RunPaths(Path(request.run))
    recipe = recipe_of(trained)
    base = find_base(request.model or recipe.model.base, request.revision or recipe.model.revision)
    return AnswerModels(base, find_adapter(trained.adapter), recipe)


def _ran(worker: Worker, form: Form) -> dict[str, Any]:
    """Run the tasks on one form; return its points, or why there are none."""
    out = worker.paths.audit_parts / "lm-eval-form.json"
    out.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", CHILD, str(worker.paths.root), form.name, str(out)]
    # The child ends when this end of its input closes: then the audit is gone, even if it was killed.
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        while process.poll() is None:
            heed(worker, "stopped; resuming goes on after the last whole form")
            time.sleep(_POLL_SECONDS)
    finally:
        _end(process)
    try:
        found: dict[str, Any] = json.loads(out.read_bytes())
    except (OSError, ValueError):
        return {"why_not": f"its process ended with {process.returncode}; its output is in output.log"}
    finally:
        out.unlink(missing_ok=True)
    return found


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    process.communicate()


def _rows(found: dict[str, list[dict[str, Any]]], reference: str) -> list[dict[str, Any]]:
    """Return a row for each task and metric that every form has."""
    by_key = {name: {(row["task"], row["metric"]): row for row in rows} for name, rows in found.items()}
    made = []
    for key, row in by_key[reference].items():
        own = {name: rows[key] for name, rows in by_key.items() if key in rows}
        points = {name: one["points"] for name, one in own.items()}
        scores = {}
        if all(_is_mean(one["points"], one["value"]) for one in own.values()):
            scores = {name: asdict(score) for name, score in score_points(points, reference).items()}
        made.append(
            {
                "task": key[0],
                "metric": key[1],
                "documents": row["documents"],
                "higher_is_better": row["higher_is_better"],
                "values": {name: one["value"] for name, one in own.items()},
                "scores": scores,
            }
        )
    return made


def _is_mean(points: Sequence[float], value: float | None) -> bool:
    """Return whether the harness's figure is the mean of the documents' points: of others no interval is known."""
    return (
        bool(points) and value is not None and abs(sum(points) / len(points) - value) <= _MEAN_GAP * max(1, abs(value))
    )
