"""A merge and the exports of what it makes, one after another, each as a run that its predecessor's process starts.

So they come to their end whoever has left meanwhile: a screen, a terminal, an SSH line.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.probe.device import CPU_PLACE
from studio.probe.export import check_memory, export_estimate, refuse_on_the_grid
from studio.probe.models import find_base
from studio.probe.space import check_space
from studio.probe.start import check_out, launch_prepared, prepare_run, start_merge
from studio.runs.atomic import write_whole
from studio.runs.job import (
    ADAPTER_FORMATS,
    EXPORT_FORMATS,
    MODULES,
    ExportRequest,
    MergeRequest,
    read_job,
)
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status

WHOLE_FORMATS = tuple(form for form in EXPORT_FORMATS if form not in ADAPTER_FORMATS)
"""What a merged model can be exported to."""


def beside(merged: Path, form: str) -> Path:
    """Return where an export of a merged model lies: a folder beside it.

    Also for GGUF: of a file alone there would be no card, and no Modelfile for Ollama.
    """
    return merged.with_name(f"{merged.name}-{form}")


def start_chain(request: MergeRequest, runs_root: Path, **starting: Any) -> RunPaths:
    """Check a merge and the exports that follow it, and start it; return when its worker holds the run.

    Args:
        request: What to merge, and in `then` what to make of it.
        runs_root: Where runs live.
        starting: As for `start_merge`.

    Raises:
        BadInput: The merge or an export cannot be made so, or the disk has no room for all; no folder was made.
        StudioError: The worker cannot be started; no folder is left.
    """
    merged = Path(request.out)
    size = find_base(request.base, request.revision).size_bytes if request.then and request.base else 0
    kept = most = size
    for form in request.then:
        if form not in WHOLE_FORMATS:
            shown = plain(form, one_line=True, limit=40)
            raise BadInput(f"a merged model cannot be exported as {shown}: wanted one of {', '.join(WHOLE_FORMATS)}.")
        refuse_on_the_grid(request.onto, form)
        check_out(beside(merged, form))
        check_memory(form, size)
        taken = export_estimate(form, size)
        most = max(most, kept + taken.disk_bytes)
        kept += taken.out_bytes
    if request.then:
        check_space(merged.parent, max(kept, most), "--out")
    return start_merge(request, runs_root, **starting)


def start_next(paths: RunPaths, *, module: str = MODULES["export"], now: Callable[[], float] = time.time) -> None:
    """Start the run that a merge or an export names to follow it; called by its process when it is over.

    After a failed export the next one is started all the same; after a failed merge, or a stop, none is. What cannot be
    started is told on stderr, which is the run's `output.log`.

    Args:
        paths: The run that has ended.
        module: The job's module.
        now: Unix seconds.
    """
    try:
        job = read_job(paths)
        if not isinstance(job, MergeRequest | ExportRequest) or not job.then or paths.next.exists():
            return
        goes_on = (Status.finished,) if isinstance(job, MergeRequest) else (Status.finished, Status.failed)
        if run_status(paths) not in goes_on:
            return
        run = prepare_run(_following(job), paths.root.parent, now())
        write_whole(paths.next, run.name)
        launch_prepared(run, module, {}, CPU_PLACE)
    except (StudioError, OSError) as error:
        sys.stderr.write(f"the export that should follow could not be started: {error}\n")


def _following(job: MergeRequest | ExportRequest) -> ExportRequest:
    form, *rest = job.then
    if isinstance(job, ExportRequest):
        return replace(job, format=form, out=str(beside(Path(job.source), form)), then=tuple(rest))
    merged = Path(job.out)
    return ExportRequest(str(merged), str(beside(merged, form)), form, run=job.run, onto=job.onto, then=tuple(rest))
