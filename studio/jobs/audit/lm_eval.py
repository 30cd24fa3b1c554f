"""Runs tasks of lm-eval (EleutherAI's harness) on the forms of a trained model, if the user has it installed.

Each form runs in a process of its own, `python -m studio.jobs.audit.lm_eval RUN FORM OUT`, so that the memory of the
harness and its tasks is freed with it. It writes the points of every document to OUT, and forms are compared document
by document.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio.core.answers import score_points
from studio.core.errors import BadInput, JobFailed, StudioError
from studio.core.events import Phase, Warned
from studio.jobs.audit.answer_models import AnswerModel, AnswerModels
from studio.jobs.audit.kept import KeptPart
from studio.jobs.base.progress import heed
from studio.jobs.base.tokenizer import load_tokenizer
from studio.runs.atomic import write_whole
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

CHILD = __name__
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_MEAN_GAP = 1e-6


def audit_tasks(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Run the tasks on every form and return their part of the report.

    Raises:
        BadInput: The run or its base cannot be used.
        JobFailed: lm-eval is not installed, does not know a task, or ran on no form.
        Cancelled: The user asked for a stop; finished forms are kept.
    """
    if find_spec("lm_eval") is None:
        raise JobFailed(
            "no_lm_eval", "lm-eval is not installed in this Python", "pip install lm-eval, then resume this run"
        )
    models = AnswerModels.of(request)
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


def _ran(worker: Worker, form: AnswerModel) -> dict[str, Any]:
    """Run the tasks on one form; return its rows, or why there are none."""
    out = worker.paths.audit_parts / "lm-eval-form.json"
    out.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", CHILD, str(worker.paths.root), form.name, str(out)]
    # The child ends itself when its input closes, which happens even if this process is killed.
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
    """Return whether the harness's figure is the mean of the documents' points; only then has it an interval."""
    return (
        bool(points) and value is not None and abs(sum(points) / len(points) - value) <= _MEAN_GAP * max(1, abs(value))
    )


def run(paths: RunPaths, name: str) -> dict[str, Any]:
    """Return the harness's version and its rows, or why there are none.

    Raises:
        BadInput: The run is no audit, or has no such form.
    """
    request = read_job(paths, AuditRequest)
    if request is None:
        raise BadInput("this run is not an audit")
    models = AnswerModels.of(request)
    form = next((one for one in models.forms(request.merged) if one.name == name), None)
    if form is None:
        raise BadInput(f"there is no form {name!r}")
    if why_not := models.why_not(form):
        return {"why_not": why_not}
    import lm_eval  # noqa: PLC0415  the user's own, and not in the process of the audit
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    tokenizer = load_tokenizer(RunPaths(Path(request.run)).adapter)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=HFLM(pretrained=form.open().eval(), tokenizer=tokenizer, batch_size=1),
        tasks=list(request.lm_eval),
        limit=request.lm_eval_limit or None,
        log_samples=True,
        bootstrap_iters=0,  # intervals are made from the documents' points, pairwise
    )
    return {"version": version("lm_eval"), "rows": rows_of(found)}


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each task, metric and filter, with the points of its documents where they are numbers."""
    rows = []
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            samples = [one for one in found["samples"].get(task, ()) if one["filter"] == chosen]
            points = [one.get(metric) for one in samples]
            numbers = all(isinstance(point, int | float) and math.isfinite(point) for point in points)
            rows.append(
                {
                    "task": task,
                    "metric": metric if chosen == "none" else f"{metric}, {chosen}",
                    "value": float(value) if isinstance(value, int | float) and math.isfinite(value) else None,
                    "documents": len(samples),
                    "points": [float(point) for point in points] if numbers else [],
                    "higher_is_better": (found.get("higher_is_better") or {}).get(task, {}).get(metric),
                }
            )
    return rows


def _end_with_the_audit() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main(root: Path, name: str, out: Path) -> None:
    """Run and write the result."""
    threading.Thread(target=_end_with_the_audit, daemon=True).start()
    try:
        result = run(RunPaths(root), name)
    except StudioError as error:
        result = {"why_not": str(error)}
    except (ValueError, KeyError, FileNotFoundError, ConnectionError) as error:
        # What the harness raises for an unknown task or a data set that cannot be downloaded.
        result = {"why_not": f"{type(error).__name__}: {error}"[:400]}
    write_whole(out, json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
