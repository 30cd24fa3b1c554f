"""One form of a trained model through tasks of lm-eval: `python -m studio.jobs.audit.lm_eval_child RUN FORM OUT`.

Started by `lm_eval.py`, which holds the other end of its input; writes its result to OUT, whole.
"""

import importlib
import json
import math
import os
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.jobs.audit.lm_eval import models_of
from studio.jobs.base.load import load_tokenizer
from studio.runs.atomic import write_whole
from studio.runs.audit_request import AuditRequest
from studio.runs.job import read_job
from studio.runs.layout import RunPaths


def run(paths: RunPaths, name: str) -> dict[str, Any]:
    """Return the harness's version and its rows, or why there are none.

    Raises:
        BadInput: The run is no audit, or has no such form.
    """
    request = read_job(paths, AuditRequest)
    if request is None:
        raise BadInput("this run is not an audit")
    models = models_of(request)
    form = next((one for one in models.forms(request.merged) if one.name == name), None)
    if form is None:
        raise BadInput(f"there is no form {name!r}")
    if why_not := models.why_not(form):
        return {"why_not": why_not}
    harness: Any = importlib.import_module("lm_eval")
    wrapped: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    tokenizer = load_tokenizer(RunPaths(Path(request.run)).adapter)
    found: dict[str, Any] = harness.simple_evaluate(
        model=wrapped(pretrained=form.open().eval(), tokenizer=tokenizer, batch_size=1),
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
        # An unknown task, a data set that cannot be had: the harness says it in one of these.
        result = {"why_not": f"{type(error).__name__}: {error}"[:400]}
    write_whole(out, json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
