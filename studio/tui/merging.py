"""What the merge screen knows: the choices, the estimates and the request that they become. No widget in here."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from studio.core.errors import BadInput, StudioError
from studio.core.export_formats import FORMATS, whole_formats
from studio.core.recipe import Recipe
from studio.probe.adapter_folder import Checkpoint, list_checkpoints
from studio.probe.export import export_estimate
from studio.probe.models import find_base
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.status import Status, run_status

MERGED = "merged"
"""The output that all others are made from: the 16-bit model."""
_MERGED_WORDS = "16-bit model folder"
_LIBRARIES_BYTES = 700 * 10**6
"""A merge of 7.93 GB held 680 to 721 MB in all (tests/bench/merge_results.md)."""
_WHOLE_UP_TO_BYTES = 2 * 10**9
"""Up to here (10^9 parameters) both models are also loaded whole, in fp32, for the texts side by side."""


@dataclass(frozen=True, slots=True)
class MergeFacts:
    """A training run, as far as a merge is concerned.

    Attributes:
        paths: The run.
        recipe: What it was trained from.
        checkpoints: What can be merged, by step; the last is the run's adapter.
        base_bytes: Size of the base in 16 bit; None where it cannot be found now.
        free_ram_bytes: Free main memory of this computer; None where it does not tell.
        why_not: Why nothing can be merged; empty where something can.
    """

    paths: RunPaths
    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    base_bytes: int | None
    free_ram_bytes: int | None
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class OutputEstimate:
    """An estimate of what one output takes, in bytes and seconds. None means "not known"."""

    form: str
    words: str
    out_bytes: int | None
    disk_bytes: int | None
    ram_bytes: int | None
    seconds: tuple[float, float] | None = None


def read_facts(paths: RunPaths) -> MergeFacts:
    """Look at a run, its base and this computer. It takes a moment: a base that is not here is looked up on the hub.

    Raises:
        StudioError: It is no training run.
    """
    job = read_job(paths, Recipe)
    if job is None:
        raise BadInput("this run is no training run: there is no adapter to merge. Choose one that is.")
    why, size = "", None
    try:
        base = find_base(job.model.base, job.model.revision)
        size = base.size_bytes
        if base.quantization:
            why = f"its base is quantised ({base.quantization}): merge on the command line, with --base ORIGINAL"
    except StudioError as error:
        why = str(error)
    found = tuple(list_checkpoints(paths))
    # The list ends with the run's adapter, which is the one entry without a checkpoint folder.
    if not found or found[-1].folder is not None:
        why = "it has no adapter yet: once its training has ended or was stopped, it is offered here"
    return MergeFacts(paths, job, found, size, psutil.virtual_memory().available, why)


def run_standing(paths: RunPaths) -> tuple[Status, int | None, int | None]:
    """Return the run's status and when its adapter and checkpoints last changed.

    While these stay the same, there is nothing new to merge.
    """
    return (run_status(paths), _changed_at(paths.adapter), _changed_at(paths.checkpoints))


def _changed_at(folder: Path) -> int | None:
    """Return when something was last made in a folder, in nanoseconds; None where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def estimates_of(size_bytes: int | None) -> list[OutputEstimate]:
    """Return what each output takes, for a base of this size in 16 bit; the merged model first."""
    rows = [_merged_estimate(size_bytes)]
    for form in whole_formats():
        taken = export_estimate(form, size_bytes) if size_bytes else None
        rows.append(
            OutputEstimate(
                form,
                FORMATS[form].words,
                taken.out_bytes if taken else None,
                taken.disk_bytes if taken else None,
                taken.memory_bytes if taken else None,
                taken.seconds if taken else None,
            )
        )
    return rows


def _merged_estimate(size_bytes: int | None) -> OutputEstimate:
    if not size_bytes:
        return OutputEstimate(MERGED, _MERGED_WORDS, None, None, None)
    whole = 2.6 * size_bytes if size_bytes <= _WHOLE_UP_TO_BYTES else 0.06 * size_bytes
    gigabytes = size_bytes / 1e9
    # tests/bench/merge_results.md: 1 to 8 GB on two cores, checks included.
    seconds = (6 + 2 * gigabytes, 20 + 8 * gigabytes)
    return OutputEstimate(MERGED, _MERGED_WORDS, size_bytes, size_bytes, int(_LIBRARIES_BYTES + whole), seconds)


def free_disk(folder: Path) -> int | None:
    """Return the free bytes where a folder is or will be; None where that cannot be told."""
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def proposed_out(paths: RunPaths) -> Path:
    """Return a folder for the merged model that does not exist yet, in `models` beside the folder of all runs."""
    stem = paths.root.parent.parent / "models" / paths.name
    for place in range(1, 1000):
        folder = stem if place == 1 else stem.with_name(f"{stem.name}-{place}")
        if not folder.exists():
            return folder
    return stem


def merge_request(
    facts: MergeFacts, checkpoint: Checkpoint, onto: str, out: Path, forms: Sequence[str] = ()
) -> MergeRequest:
    """Return the request to merge a checkpoint, and then to export the merged model to these formats."""
    request = MergeRequest(
        adapter=str(facts.paths.adapter.absolute()),
        base=facts.recipe.model.base,
        revision=facts.recipe.model.revision,
        out=str(out.expanduser().absolute()),
        onto=onto,
        run=str(facts.paths.root.absolute()),
        then=tuple(forms),
    )
    return replace(request, checkpoint=str(checkpoint.folder.absolute())) if checkpoint.folder else request
