"""The table of job kinds: the type of request, the module that does the job, and the checks before it starts."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from studio.core.errors import BadInput
from studio.core.placement.auto import CHOSEN
from studio.core.recipe import Recipe
from studio.core.recipe_parse import refuse
from studio.core.text import plain
from studio.probe.audit import check_audit
from studio.probe.data.opened import Progress
from studio.probe.device import CPU_PLACE, Place, place_of, recorded_card
from studio.probe.export import check_export, check_exports, check_token
from studio.probe.measure import base_config
from studio.probe.merge import check_merge
from studio.probe.models import BaseFound, refuse_untrainable
from studio.probe.plan import plan_for
from studio.probe.preflight import check_training
from studio.probe.resume import check_resume
from studio.probe.space import check_memory
from studio.runs.job import TRAIN, J, Job, kind_of
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest, ExportRequest, MeasureRequest, MergeRequest

_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")
"""The time of its start, with which the name of a run ends."""


@dataclass(frozen=True, slots=True)
class Checked(Generic[J]):
    """A job that can be started.

    Attributes:
        job: As it is written into the run, with absolute paths.
        place: Where it will run.
        notes: What the user should know, though it stops nothing.
        plan: The memory estimate at launch, ready for JSON; None where there is none.
    """

    job: J
    place: Place = CPU_PLACE
    notes: tuple[str, ...] = ()
    plan: Mapping[str, Any] | None = None


def _on_the_cpu(job: Job, paths: RunPaths) -> Place:
    """Return the CPU. Merges and exports never use a card, which may be busy with a training."""
    return CPU_PLACE


@dataclass(frozen=True, slots=True)
class JobKind(Generic[J]):
    """A kind of job: a row of the table.

    Attributes:
        request: The type that asks for such a job: a recipe, or a request of its own.
        module: The module that does it, started as `python -m MODULE RUN`.
        title: Returns the name of a run of it; the time of its start is added.
        check: Returns the job as it can be started; raises BadInput for everything that is known to be wrong by then.
            It tells (done, total) of what takes long.
        check_resume: Returns where an ended run of it goes on; raises BadInput where it cannot.
        has_checkpoints: Whether a resumed run goes on after a checkpoint, and may start over where none is whole.
    """

    request: type[J]
    module: str
    title: Callable[[J], str]
    check: Callable[[J, Progress], Checked[J]]
    check_resume: Callable[[J, RunPaths], Place] = _on_the_cpu
    has_checkpoints: bool = False


def kind_named(name: str) -> JobKind[Any]:
    """Return the kind of job of this name.

    Raises:
        BadInput: There is none.
    """
    if name not in KINDS:
        shown = plain(name, one_line=True, limit=40)
        raise BadInput(f"{shown!r} is a kind of job that this version does not know: update lora-studio.")
    return KINDS[name]


def kind_for(job: J) -> JobKind[J]:
    """Return the kind that a job is of."""
    return KINDS[kind_of(job)]


def _named_after(folder: str) -> str:
    """Return the name of a run or of a folder, without the time of its start that ends a run's name."""
    return _STAMP.sub("", Path(folder).name)


def _check_training(recipe: Recipe, progress: Progress) -> Checked[Recipe]:
    report = check_training(recipe, progress=progress)
    plan = plan_for(report.recipe, report.base, place=report.place)
    recipe = report.recipe
    # Of a model that cannot be sized all layers are computed again, which takes the least memory, and none is streamed.
    said = {"recompute": "all", "stream": "off", "keep_dequantised": False, **plan.get("setup", {})}
    for path in CHOSEN:
        if recipe.get(path) == "auto":
            recipe = recipe.with_(path, said[path.rpartition(".")[2]])
    waiting = plan.get("host_parts", {}).get("weights", 0)
    if waiting and plan.get("card"):
        advice = "stream fewer layers (model.stream), take method qlora, or close what uses the memory."
        check_memory(waiting, "the streamed layers wait in main memory and need about", advice)
    return Checked(recipe, report.place, report.notes, plan)


def _check_training_again(recipe: Recipe, paths: RunPaths) -> Place:
    """Return the card that the run used before, where it is visible; refuse another base, data or recipe."""
    check_resume(paths, recipe)
    return place_of(recipe.device.device, run_card=recorded_card(paths))


def _check_merge(request: MergeRequest, progress: Progress) -> Checked[MergeRequest]:
    check_merge(request)
    check_exports(request)  # now, because `start_next` starts them without a check
    return Checked(request)


def _check_export(request: ExportRequest, progress: Progress) -> Checked[ExportRequest]:
    check_export(request)
    check_token(request)
    return Checked(request)


def _check_measure(request: MeasureRequest, progress: Progress) -> Checked[MeasureRequest]:
    recipe = request.recipe
    refuse(recipe.problems())
    # The configuration alone tells whether the base is quantised, so its weights need not be here.
    config = base_config(recipe.model.base, recipe.model.revision)
    refuse_untrainable(BaseFound("folder", recipe.model.base, None, config, 0), recipe.method)
    place = _measured_on(request)
    if place.refusal:
        raise BadInput(f"{place.refusal} Or trace the step, which needs no card: --trace.")
    return Checked(request, place)


def _measured_on(request: MeasureRequest, paths: RunPaths | None = None) -> Place:
    if request.how == "trace":
        return CPU_PLACE
    return place_of(request.recipe.device.device)


def _check_audit(request: AuditRequest, progress: Progress) -> Checked[AuditRequest]:
    check_audit(request)
    return Checked(request, _audited_on(request).or_refuse())


def _audited_on(request: AuditRequest, paths: RunPaths | None = None) -> Place:
    """Return the card that the audited run was trained on, where it is visible; for a race, what its recipe says."""
    if request.recipe is not None:
        return place_of(request.recipe.device.device)
    about = RunPaths(Path(request.run)) if request.run and request.device == "auto" else None
    return place_of(request.device, run_card=recorded_card(about), setting="--device")


KINDS: dict[str, JobKind[Any]] = {
    TRAIN: JobKind(
        Recipe, "studio.jobs.train", lambda job: job.name, _check_training, _check_training_again, has_checkpoints=True
    ),
    MergeRequest.kind: JobKind(
        MergeRequest, "studio.jobs.merge", lambda job: f"merge-{_named_after(job.run or job.adapter)}", _check_merge
    ),
    ExportRequest.kind: JobKind(
        ExportRequest,
        "studio.jobs.export",
        lambda job: f"export-{job.format}-{_named_after(job.run or job.source)}",
        _check_export,
    ),
    AuditRequest.kind: JobKind(
        AuditRequest,
        "studio.jobs.audit",
        lambda job: f"audit-{job.what}-{_named_after(job.run or job.model)}",
        _check_audit,
        _audited_on,
    ),
    MeasureRequest.kind: JobKind(
        MeasureRequest, "studio.jobs.measure", lambda job: "measure", _check_measure, _measured_on
    ),
}
"""All kinds of job, by name."""
