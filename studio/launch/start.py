"""From a job to its running worker: check the job, make the run's folder, launch. Screens and verbs share this."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from studio.core.errors import BadInput, StudioError
from studio.core.recipe import Recipe
from studio.core.schedule import Extension
from studio.core.text import plain
from studio.launch.kinds import Checked, kind_for, kind_named
from studio.launch.queued import join, places_for
from studio.probe.adapter_folder import start_folder
from studio.probe.data.opened import Progress
from studio.probe.device import CPU_PLACE, Place
from studio.probe.space import check_space
from studio.runs import supervise
from studio.runs.atomic import write_whole
from studio.runs.chain import following
from studio.runs.checkpoints import resumption
from studio.runs.control import request
from studio.runs.extension import Wish, extension_for, extension_words, read_extensions, write_extensions
from studio.runs.job import J, Job, kind_of_run, read_job, write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.status import run_status
from studio.runs.watch import read_history

_SHOWN = 40


def start(
    job: J,
    runs_root: Path,
    *,
    module: str | None = None,
    now: Callable[[], float] = time.time,
    plan: Mapping[str, Any] | None = None,
    on_checked: Callable[[Checked[J]], None] = lambda checked: None,
    queue: Callable[[Checked[J]], bool] = lambda checked: False,
    restarts: int = 0,
    progress: Progress = lambda done, total: None,
    **launching: Any,
) -> RunPaths:
    """Check a job, make its run and launch the worker; return when the worker holds the run.

    Args:
        job: A recipe to train, or the request of another kind of job.
        runs_root: Where runs live.
        module: The job's module; None takes that of its kind.
        now: Unix seconds.
        plan: The memory estimate, kept in the run; None takes the one that the check made.
        on_checked: Gets the checked job and its notes, before anything is written.
        queue: Asked next: whether the run waits in the queue until a card is free, instead of starting at once.
        restarts: How often the run is resumed by itself after a crash of its process.
        progress: Told (done, total) of data that are downloaded or read for the check; may raise to end it.
        launching: Further arguments of `studio.runs.supervise.launch`.

    Raises:
        BadInput: The job cannot be done as it is asked for; no folder was made.
        StudioError: The worker cannot be started; no folder is left.
    """
    check_space(runs_root)
    kind = kind_for(job)
    if isinstance(job, Recipe) and job.adapter.start:
        job = cast("J", job.with_("adapter.start", str(start_folder(job.adapter.start, runs_root))))
    checked = kind.check(job, progress)
    on_checked(checked)
    queued = queue(checked)
    paths = prepare(checked.job, runs_root, now(), checked.plan if plan is None else plan)
    if queued:
        try:
            join(paths, places_for(checked))
        except (StudioError, OSError):
            shutil.rmtree(paths.root, ignore_errors=True)
            raise
    _launch(paths, module or kind.module, checked.place, launching)
    if restarts > 0:
        supervise.start_guard(paths, restarts, module or "", launching.get("environment"))
    return paths


def prepare(job: Job, runs_root: Path, now: float, plan: Mapping[str, Any] | None = None) -> RunPaths:
    """Make a run's folder and write what it is asked to do; nothing is left behind when that fails.

    Args:
        job: What to do, with absolute paths.
        runs_root: Where runs live.
        now: Unix seconds; becomes part of the name.
        plan: The memory estimate at launch, ready for JSON; None where there is none.

    Raises:
        BadInput: The folder cannot be made or written, or a path of the job is no UTF-8.
    """
    paths = new_run(runs_root, kind_for(job).title(job), now)
    try:
        write_job(paths, job)
        if plan is not None:
            write_whole(paths.plan, json.dumps(plan, indent=1, allow_nan=False) + "\n")
    except KeyboardInterrupt:
        shutil.rmtree(paths.root, ignore_errors=True)
        raise
    except UnicodeEncodeError as error:
        shutil.rmtree(paths.root, ignore_errors=True)
        near = plain(error.object[max(0, error.start - _SHOWN) : error.end + _SHOWN], one_line=True)
        raise BadInput(
            f"a run's recipe.toml is UTF-8, and this path is not: ... {near} ...; rename the file or folder."
        ) from error
    except OSError as error:
        shutil.rmtree(paths.root, ignore_errors=True)
        shown = plain(str(paths.root), one_line=True)
        raise BadInput(f"the run folder {shown} cannot be written: {error.strerror}.") from error
    return paths


def start_next(paths: RunPaths, *, module: str | None = None, now: Callable[[], float] = time.time) -> RunPaths | None:
    """Start the export that follows a run which has ended; return None where none follows.

    The export is not checked first. Whatever is wrong with it fails a run of its own, where the user can look at it.

    Args:
        paths: The run that has ended.
        module: The export's module; None takes that of its kind.
        now: Unix seconds.

    Raises:
        StudioError: The run is damaged, or the worker cannot be started; no folder is left.
        OSError: The run that has ended cannot be written to.
    """
    job = following(paths)
    if job is None:
        return None
    run = prepare(job, paths.root.parent, now())
    # Written before the launch: from now on `following` names no export, so that none is started twice.
    write_whole(paths.next, run.name)
    return _launch(run, module or kind_for(job).module, CPU_PLACE, {})


def resume(
    paths: RunPaths,
    *,
    module: str | None = None,
    from_start: bool = False,
    step: int | None = None,
    queue: bool = False,
    restarts: int = 0,
    **launching: Any,
) -> supervise.Handle:
    """Start a worker in the folder of a run that was stopped, failed or crashed, on the card that it ran on.

    Args:
        paths: The run.
        module: The job's module; None takes that of its kind.
        from_start: Whether training may start over where no checkpoint is whole.
        step: The step of the checkpoint after which it goes on; None for the newest whole one.
        queue: Whether it waits until its card is free.
        restarts: How often it is resumed by itself after a further crash; for a training.
        launching: Further arguments of `studio.runs.supervise.launch`.

    Raises:
        NoWholeCheckpoint: The run had checkpoints and none is whole; nothing was changed.
        BadInput: The run is live or finished, its `recipe.toml` is unreadable, its base, data or recipe is another one
            than it began with, or its card cannot be used.
        StudioError: The process cannot be started.
    """
    name = kind_of_run(paths)
    kind = kind_named(name)
    job = read_job(paths, kind.request)
    supervise.refuse_unless_ended(paths, back=step is not None)
    place = kind.check_resume(job, paths).or_refuse()
    if kind.has_checkpoints:
        resumption(paths, read_history(paths), from_start=from_start, step=step)
    elif from_start or step is not None:
        shown = plain(paths.name, one_line=True)
        raise BadInput(
            f"the run {shown} is of the kind {name}: only training starts over or goes back. Resume it as it is."
        )
    before = (lambda: join(paths, places_for(Checked(job, place)))) if queue else None
    placed = _placed(launching, place)
    handle = supervise.resume(
        paths, module=module or kind.module, from_start=from_start, step=step, before=before, **placed
    )
    if restarts > 0:
        supervise.start_guard(paths, restarts, module or "", launching.get("environment"))
    return handle


def plan_extension(paths: RunPaths, wish: Wish) -> tuple[Extension, str]:
    """Return what a wish adds to a training run that has ended, and that in words.

    Raises:
        BadInput: The run cannot be extended.
    """
    recipe = read_job(paths, Recipe)
    name = plain(paths.name, one_line=True)
    if recipe is None:
        raise BadInput(f"the run {name} is no training: only training runs are extended.")
    if run_status(paths).live:
        raise BadInput(f"the run {name} is live: stop it first (lora-studio runs stop {name}), then extend it.")
    extension = extension_for(paths, recipe, read_history(paths), wish)
    return extension, extension_words(paths, recipe, extension)


def extend(
    paths: RunPaths,
    wish: Wish,
    *,
    told: Callable[[str], None] = lambda words: None,
    **resuming: Any,
) -> supervise.Handle:
    """Let a training run that has ended train longer, from its newest checkpoint on.

    Args:
        paths: The run: finished, stopped, failed or crashed.
        wish: How much longer, and how the learning rate goes on.
        told: Gets what will be done, in words, before anything is written; may raise to end it.
        resuming: Further arguments of `resume`.

    Raises:
        BadInput: It cannot be extended or resumed; nothing was changed.
        StudioError: The process cannot be started; nothing was changed.
    """
    extension, words = plan_extension(paths, wish)
    told(words)
    before = read_extensions(paths)
    try:
        write_extensions(paths, [*before, extension])
        return resume(paths, **resuming)
    except BaseException as error:
        if not run_status(paths).live:
            write_extensions(paths, before)
        if isinstance(error, OSError):
            name = plain(paths.name, one_line=True)
            raise BadInput(f"the run {name} cannot be extended: {error.strerror or error}.") from error
        raise


def _launch(paths: RunPaths, module: str, place: Place, launching: Mapping[str, Any]) -> RunPaths:
    """Launch the worker of a prepared run on a card or the CPU; where that fails, remove the run's folder."""
    try:
        supervise.launch(paths, module, **_placed(launching, place))
    except KeyboardInterrupt:
        # The worker may live already, so its folder stays. Whoever interrupts the start wants no run: ask it to stop.
        request(paths, "stop")
        raise
    except (StudioError, OSError):
        shutil.rmtree(paths.root, ignore_errors=True)
        raise
    return paths


def _placed(launching: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return the arguments of a launch with the variables of a place in the environment; the caller's own win."""
    return {**launching, "environment": {**place.environment, **(launching.get("environment") or {})}}
