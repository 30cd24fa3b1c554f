"""Runs beside each other: their curves and where their recipes differ. Knows no widget."""

from collections.abc import Sequence
from dataclasses import dataclass

from studio.core.errors import BadInput
from studio.core.recipe import Recipe, differing_fields, field_text
from studio.core.text import plain
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.summary import peak_bytes
from studio.runs.watch import read_history
from studio.tui.readable import UNKNOWN, duration, gib, number

MOST = 4
"""Runs that a plot tells apart by colour."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One run of a comparison; the recipe is None where it is no training run or cannot be read."""

    name: str
    recipe: Recipe | None
    history: History


def read_compared(paths: RunPaths) -> Compared:
    """Read a run to the end of its log. Takes about a second for 100 000 steps."""
    try:
        recipe = read_job(paths, Recipe)
    except BadInput:
        recipe = None
    return Compared(plain(paths.name, one_line=True), recipe, read_history(paths))


def difference_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return the fields in which the recipes differ, each with one value per run; the name is no difference."""
    differing = differing_fields([run.recipe for run in runs])
    return [(path, *(field_text(path, value) for value in values)) for path, values in differing.items()]


def outcome_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return what came of the runs, each row with one value per run."""
    histories = [run.history for run in runs]
    return [
        ("steps", *(f"{history.last_step}/{history.total_steps or '?'}" for history in histories)),
        ("held-out loss", *(number(h.evals[-1].loss) if h.evals else UNKNOWN for h in histories)),
        ("training loss", *(number(h.train.losses[-1]) if h.train.losses else UNKNOWN for h in histories)),
        ("tokens/s", *(number(h.tokens_per_second) for h in histories)),
        ("peak, GiB", *(gib(peak_bytes(history)) for history in histories)),
        ("time", *(duration(history.seconds) for history in histories)),
    ]
