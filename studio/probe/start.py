"""From something asked for to a running worker: check, make the run's folder, launch. Screens and verbs share it."""

import json
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput, StudioError
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.core.text import plain
from studio.probe.adapter_folder import ADAPTER_CONFIG, find_adapter
from studio.probe.device import CPU_PLACE, Place, place_of, recorded_card
from studio.probe.fingerprint import difference, known_fingerprint, recorded_fingerprint
from studio.probe.models import BaseFound, find_base
from studio.probe.plan import plan_for
from studio.probe.preflight import PreflightReport, check_training
from studio.probe.resume import check_resume
from studio.probe.space import check_name, check_place, check_space
from studio.runs.atomic import write_whole
from studio.runs.audit_request import AuditRequest
from studio.runs.control import request
from studio.runs.job import MODULES, ONTO, ExportRequest, Job, MergeRequest, read_job, write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.measure_request import MeasureRequest
from studio.runs.status import Status, run_status
from studio.runs.supervise import Handle, launch, resume

_SHOWN = 40
_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")


def prepare_run(job: Job, runs_root: Path, now: float, plan: Mapping[str, Any] | None = None) -> RunPaths:
    """Make a run's folder and write what it is asked to do; nothing is left behind when that fails.

    Args:
        job: A recipe with absolute paths, a merge or an export.
        runs_root: Where runs live.
        now: Unix seconds; becomes part of the name.
        plan: The memory estimate at launch, ready for JSON; None where there is none.

    Raises:
        BadInput: The folder cannot be made or written, or a path of the job is no UTF-8.
    """
    paths = new_run(runs_root, _name_of(job), now)
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


def start_training(
    recipe: Recipe,
    runs_root: Path,
    *,
    module: str = MODULES["train"],
    now: Callable[[], float] = time.time,
    plan: Mapping[str, Any] | None = None,
    on_checked: Callable[[PreflightReport], None] = lambda report: None,
    **launching: Any,
) -> RunPaths:
    """Check a recipe, make its run and launch the worker; return when the worker holds the run.

    Args:
        recipe: What to train.
        runs_root: Where runs live.
        module: The job's module.
        now: Unix seconds.
        plan: The memory estimate, kept in the run; None makes one.
        on_checked: Gets the report before anything is made.
        launching: As for `launch`.

    Raises:
        BadInput: The recipe, the model or the data cannot be used; no folder was made.
        StudioError: The worker cannot be started; no folder is left.
    """
    check_space(runs_root)
    report = check_training(recipe)
    on_checked(report)
    plan = plan_for(report.recipe, report.base, place=report.place) if plan is None else plan
    return launch_prepared(prepare_run(report.recipe, runs_root, now(), plan), module, launching, report.place)


def start_merge(
    request: MergeRequest,
    runs_root: Path,
    *,
    module: str = MODULES["merge"],
    now: Callable[[], float] = time.time,
    **launching: Any,
) -> RunPaths:
    """Check a merge, make its run and launch the worker; return when the worker holds the run.

    Args:
        request: What to merge into what.
        runs_root: Where runs live.
        module: The job's module.
        now: Unix seconds.
        launching: As for `launch`.

    Raises:
        BadInput: The adapter, the base or the output folder cannot be used; no folder was made.
        StudioError: The worker cannot be started; no folder is left.
    """
    check_merge(request)
    check_space(runs_root)
    return launch_prepared(prepare_run(request, runs_root, now()), module, launching, CPU_PLACE)


def check_out(out: Path) -> None:
    """Check that nothing lies where a model is to be written, and that it can be written there.

    Raises:
        BadInput: Something does, or it cannot.
    """
    check_name(out)
    shown = plain(str(out), one_line=True)
    try:
        if out.is_symlink():  # a finished folder cannot be renamed over it
            raise BadInput(f"the output {shown} is a symbolic link: name the place that it points to.")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"the output {shown} already exists and is not empty: choose another --out or remove it.")
    except OSError as error:
        raise BadInput(f"the output {shown} cannot be used: {error.strerror}.") from error
    try:
        check_place(out.absolute().parent, "--out")
    except BadInput as error:
        raise BadInput(f"the output {shown} cannot be made: {error}") from error


def _name_of(job: Job) -> str:
    if isinstance(job, Recipe):
        return job.name
    if isinstance(job, MergeRequest):
        return f"merge-{_STAMP.sub('', Path(job.run or job.adapter).name)}"
    if isinstance(job, MeasureRequest):
        return "measure"
    if isinstance(job, AuditRequest):
        return f"audit-{job.what}-{_STAMP.sub('', Path(job.run or job.model).name)}"
    return f"export-{job.format}-{_STAMP.sub('', Path(job.run or job.source).name)}"


def check_merge(request: MergeRequest) -> None:
    """Check what a merge starts from and where it goes.

    Raises:
        BadInput: No whole adapter, no 16- or 32-bit base model, or an output folder that already holds something.
    """
    adapter, out = Path(request.adapter), Path(request.out)
    if not (adapter / ADAPTER_CONFIG).is_file():
        shown = plain(str(adapter), one_line=True)
        raise BadInput(
            f"{shown} is no adapter folder: it has no {ADAPTER_CONFIG}. Name a finished run or a PEFT folder."
        )
    if request.onto not in ONTO:
        raise BadInput(f"merge onto {plain(request.onto, one_line=True, limit=40)}? Wanted one of: {', '.join(ONTO)}.")
    if request.base:
        base = base_of_merge(request.base, request.revision)
        refuse_quantised(base)
        if base.path is not None:
            refuse_another_base(request.run, base.path, known_fingerprint)
    check_out(out)
    for folder, _ in request.weighted:
        find_adapter(Path(folder))


def base_of_merge(word: str, revision: str = "") -> BaseFound:
    """Return the base that an adapter is merged into.

    Raises:
        BadInput: It cannot be loaded; says how to name another place, as the adapter may come from another computer.
    """
    try:
        return find_base(word, revision)
    except BadInput as error:
        raise BadInput(
            f"{error} If the base that the adapter was trained on lies elsewhere, name it: --base."
        ) from None


def refuse_quantised(base: BaseFound) -> None:
    """Refuse to merge into weights that are quantised already.

    Raises:
        BadInput: They are; says why, and what to merge into instead.
    """
    if how := plain(base.quantization, one_line=True, limit=40):
        # Measured: KL 1.99 against the trained model after a merge into NF4, 2.05 without any adapter.
        raise BadInput(
            f"the base model {plain(base.word, one_line=True)} is quantised ({how}). Rounding after the merge would "
            "erase most of what was trained. Name the original 16-bit model with --base, merge, then quantise the "
            "merged model."
        )


def refuse_another_base(run: str, folder: Path, look: Callable[[Path], Mapping[str, Any]]) -> None:
    """Refuse a base other than the one that a run trained on, also where the shapes are equal.

    Args:
        run: The training run's folder; empty where it is not known: then nothing can be compared.
        folder: The base.
        look: Returns its fingerprint: `known_fingerprint` where nobody can wait, a job reads every weight.

    Raises:
        BadInput: The weights differ.
    """
    trained = recorded_fingerprint(run)
    if trained is None or trained.get("quantized"):
        return
    if differs := difference(trained, look(folder)):
        raise BadInput(
            f"{plain(str(folder), one_line=True)} is not the base that this adapter was trained on: {differs}. "
            "With it, the model would not be the one that was trained. Name the right one with --base."
        )


def launch_prepared(paths: RunPaths, module: str, launching: Mapping[str, Any], place: Place) -> RunPaths:
    """Launch the worker of a prepared run where it shall run; where that fails, no folder is left.

    Raises:
        StudioError: The process cannot be started.
    """
    try:
        launch(paths, module, **_placed(launching, place))
    except KeyboardInterrupt:
        # The process may have been started a moment ago: who interrupts the start wants no run.
        request(paths, "stop")
        raise
    except (StudioError, OSError):
        shutil.rmtree(paths.root, ignore_errors=True)
        raise
    return paths


def resume_run(paths: RunPaths, *, from_start: bool = False, **launching: Any) -> Handle:
    """Start a worker in the folder of a run that was stopped, failed or crashed, on the card that it ran on.

    Args:
        paths: The run.
        from_start: Whether training may start over where no checkpoint is whole.
        launching: As for `studio.runs.supervise.resume`.

    Raises:
        NoWholeCheckpoint: The run had checkpoints and none is whole; nothing was changed.
        BadInput: The run is live or finished, its `recipe.toml` is unreadable, its base, data or recipe is another one
            than it began with, or its card cannot be used.
        StudioError: The process cannot be started.
    """
    job = read_job(paths)
    status = run_status(paths)
    if isinstance(job, Recipe) and not status.live and status is not Status.finished:
        check_resume(paths, job)
    place = place_of_job(job, paths).or_refuse()
    return resume(paths, from_start=from_start, **_placed(launching, place))


def place_of_job(job: Job, paths: RunPaths | None = None) -> Place:
    """Return where a job runs: on the card that it, or the run that it is about, ran on before, where that is visible.

    Merges and exports run on the CPU: the card may be busy with a training.

    Args:
        job: What is asked for.
        paths: Its run, where that has begun already.

    Raises:
        BadInput: The recipe of a race or a measurement is damaged.
    """
    if isinstance(job, Recipe):
        return place_of(job.device.device, run_card=recorded_card(paths))
    if isinstance(job, MergeRequest | ExportRequest) or (isinstance(job, MeasureRequest) and job.how == "trace"):
        return CPU_PLACE
    if isinstance(job, AuditRequest) and not job.recipe:
        about = RunPaths(Path(job.run)) if job.run and job.device == "auto" else None
        return place_of(job.device, run_card=recorded_card(about), setting="--device")
    return place_of(recipe_from_dict(tomllib.loads(job.recipe)).device.device)


def _placed(launching: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Return the arguments of a launch whose environment names the place; what the caller sets goes before it."""
    return {**launching, "environment": {**place.environment, **(launching.get("environment") or {})}}
