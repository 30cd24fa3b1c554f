"""Checks a training run for everything that can be found wrong before a process starts or a folder is made."""

from dataclasses import dataclass, replace
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.preferences import rate_note
from studio.core.recipe import Recipe
from studio.core.recipe_parse import refuse
from studio.core.text import plain
from studio.probe.adapter_folder import check_start
from studio.probe.data import DataSet
from studio.probe.data.mixture import at_commits, data_of, eval_data_of, missing_data
from studio.probe.data.opened import Progress
from studio.probe.data.places import same_place
from studio.probe.device import Place, Sight, place_of
from studio.probe.fingerprint import known_fingerprint
from studio.probe.held_out import hold_out
from studio.probe.models import BaseFound, find_base, refuse_untrainable
from studio.probe.named_template import check_template
from studio.probe.reasoning_advice import advice_of
from studio.runs.recipe_file import resolve_paths

_AT_ONCE_BYTES = 2**26
"""Data of the hub up to this size are downloaded before the run is made. The job downloads larger ones, and shows how
far it is."""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What a training run starts from, once it is checked.

    Attributes:
        recipe: The recipe with absolute paths, as it is written into the run.
        base: The base model.
        data: The rows to train on and, without a file for it, to hold out; None where they are downloaded by the run.
        notes: What the user should know, though it stops nothing.
        place: Where it will run.
    """

    recipe: Recipe
    base: BaseFound
    data: DataSet | None
    notes: tuple[str, ...]
    place: Place


def check_training(recipe: Recipe, *, sight: Sight | None = None, progress: Progress | None = None) -> PreflightReport:
    """Check a recipe against this machine: its fields, its card, the base model and every row of its data.

    Args:
        recipe: What is asked for; relative paths are taken from the current folder.
        sight: What is known of the machine's cards; None looks.
        progress: Told (done, total) of the data that are downloaded or read; may raise to end it.

    Raises:
        BadInput: Something would keep the run from starting; the message says what, and what to do.
    """
    refuse(recipe.problems())
    recipe = resolve_paths(recipe, (Path.cwd(),))
    place = place_of(recipe.device.device, sight).or_refuse()
    notes: tuple[str, ...] = (place.note,) if place.note else ()
    base = find_base(recipe.model.base, recipe.model.revision)
    refuse_untrainable(base, recipe.method)
    check_template(recipe, base)
    check_start(recipe, base.path, known_fingerprint)
    if missing := missing_data(recipe):
        size_bytes = sum(missing.values())
        if size_bytes > _AT_ONCE_BYTES:
            listed = ", ".join(plain(word, one_line=True) for word in missing)
            notes += (f"{listed}: {size_bytes / 1e9:.1f} GB are downloaded by the run; it checks the rows then.",)
            return PreflightReport(at_commits(recipe), base, None, notes, place)
    data, eval_data = data_of(recipe, progress=progress), eval_data_of(recipe, progress=progress)
    if data.commit:
        recipe = recipe.with_("data.revision", data.commit)  # so that a resume reads the same rows
    if eval_data and eval_data.commit and not same_place(recipe.data.eval_path, recipe.data.path):
        recipe = recipe.with_("data.eval_path", eval_data.word)
    if any(part.data.commit for part in data.parts):
        pinned = zip(recipe.data.sources, data.parts, strict=True)
        sources = (replace(one, path=part.data.word if part.data.commit else one.path) for one, part in pinned)
        recipe = recipe.with_("data.sources", tuple(sources))
    notes += (*data.notes(), *(eval_data.notes() if eval_data else ()))
    notes += tuple(filter(None, (rate_note(recipe), advice_of(recipe, base.path, data.rows))))
    if recipe.data.template and data.format == "text":
        notes += ("data.template is not used: plain text has no turns to write.",)
    if data.parts:
        notes += (f"{data.described()}.",)
    if eval_data is not None or recipe.eval.rows:
        parts = hold_out(recipe, data, eval_data)
        if not parts.train or not parts.held_out:
            raise BadInput(
                f"data.path: {len(data.rows)} usable row(s) are too few to train on some and hold out others: add "
                "rows, name a file in data.eval_path, or set eval.rows and eval.samples to 0."
            )
        notes += parts.notes
    return PreflightReport(recipe, base, data, notes, place)
