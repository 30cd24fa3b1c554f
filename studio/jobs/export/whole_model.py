"""The merged 16-bit model that an export starts from: the folder that was named, or one merged for it now.

Merging is a job of its own, so it is done as one: a run inside this run's folder, followed to its end.
"""

import shutil
import time
from pathlib import Path

from studio.core.errors import JobFailed
from studio.core.events import Phase, Warned
from studio.core.text import plain
from studio.jobs.export.work import Work
from studio.runs.history import History
from studio.runs.job import ExportRequest, MergeRequest, write_job
from studio.runs.last_words import crash_of
from studio.runs.layout import ADAPTER_CONFIG, RunPaths
from studio.runs.scratch import merged_for
from studio.runs.status import Status, run_status
from studio.runs.supervise import launch, resume, stop
from studio.runs.watch import RunWatch

_MERGE = "studio.jobs.merge"
"""By name, as jobs do not import each other."""
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0


def is_adapter(source: Path) -> bool:
    """Return whether a folder holds an adapter, not a whole model."""
    return (source / ADAPTER_CONFIG).is_file()


def merge_first(work: Work, asked: ExportRequest) -> Path:
    """Merge the adapter into the folder beside the export's output and return it.

    Args:
        work: The export, which tells the merge's progress as its own.
        asked: Names the adapter and what it is merged into.

    Raises:
        JobFailed: The merge failed; the reason is its own.
    """
    paths, out = RunPaths(work.worker.paths.merge), merged_for(Path(asked.out))
    if run_status(paths) is Status.finished:
        if out.is_dir():
            return out
        shutil.rmtree(paths.root)  # the model was deleted meanwhile
    if not paths.recipe.is_file():
        shutil.rmtree(out, ignore_errors=True)
        paths.root.mkdir(mode=0o700, exist_ok=True)
        merge = MergeRequest(asked.source, asked.base, str(out), asked.revision, onto=asked.onto, run=asked.run)
        write_job(paths, merge)
        launch(paths, _MERGE)
    elif not run_status(paths).live:
        resume(paths, module=_MERGE)  # of an export that was killed: whole shards are taken up again
    watch = RunWatch(paths)
    try:
        while (events := watch.poll()) or run_status(paths).live:
            for event in events:
                if isinstance(event, Phase):
                    work.say(f"merge: {event.name}", event.fraction, event.detail)
                elif isinstance(event, Warned):
                    work.warn(event.message)
            work.heed()
            if not events:
                time.sleep(_POLL_SECONDS)
    except BaseException:
        stop(paths, grace_seconds=_STOP_SECONDS)  # its model must not appear when nobody is left to delete it
        raise
    watch.catch_up()
    if failed := watch.history.failed:
        raise JobFailed(failed.failure, f"the merge before the export failed: {failed.message}", failed.advice)
    if watch.history.finished is None or not out.is_dir():
        raise _ended_early(paths, watch.history)
    return out


def _ended_early(paths: RunPaths, history: History) -> JobFailed:
    """Why the merge's process is gone without an event: what it printed last, where that tells it."""
    if known := crash_of(paths, history):
        # What goes on is the export, whose name its reader puts in.
        advice = known.advice.replace(f"resume {paths.name}", "resume RUN")
        return JobFailed(known.kind, f"the merge before the export ended early: {known}", advice)
    where = plain(str(paths.output), one_line=True)
    return JobFailed("merge_crashed", "the merge before the export ended early", f"look at the end of {where}")
