"""A merge and the exports of its model, one after another: each is a run, and names the ones that follow it."""

from dataclasses import replace
from pathlib import Path

from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.status import Status, run_status

_LONGEST_NAME = 255


def beside(merged: Path, form: str) -> Path:
    """Return the folder of an export of a merged model, which is beside the model.

    GGUF files have a folder too: beside a file alone there would be no model card, and no Modelfile for Ollama.
    """
    return merged.with_name(f"{merged.name}-{form}")


def following(paths: RunPaths) -> ExportRequest | None:
    """Return the export that a merge or an export which has ended names to follow it, unless it was started already.

    After a failed export the next one follows all the same. After a failed merge, or a stop, none does.

    Raises:
        BadInput: `recipe.toml` is missing or damaged.
    """
    merge = read_job(paths, MergeRequest)
    job = merge or read_job(paths, ExportRequest)
    if job is None or not job.then or paths.next.exists():
        return None
    if run_status(paths) not in ((Status.finished,) if merge else (Status.finished, Status.failed)):
        return None
    form, *rest = job.then
    if isinstance(job, ExportRequest):
        return replace(job, format=form, out=str(beside(Path(job.source), form)), then=tuple(rest))
    merged = Path(job.out)
    return ExportRequest(str(merged), str(beside(merged, form)), form, run=job.run, onto=job.onto, then=tuple(rest))


def next_run(paths: RunPaths) -> RunPaths | None:
    """Return the run that was started when this one had ended; None where there is none (yet)."""
    try:
        name = paths.next.read_text("utf-8")[:_LONGEST_NAME].strip()
    except (OSError, ValueError):
        return None
    run = RunPaths(paths.root.parent / Path(name).name)
    return run if name and run.exists else None
