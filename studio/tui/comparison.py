"""Runs beside each other: their curves and where their recipes differ. Knows no widget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.errors import BadInput
from studio.core.recipe import PATHS, Recipe
from studio.core.text import plain
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.watch import read_history
from studio.tui.readable import UNKNOWN, gib, number

MOST = 4
"""Runs that a plot tells apart by colour."""

_LONGEST = 40


@dataclass(frozen=True, slots=True)
class Compared:
    """One run of a comparison; the recipe is None where it is no training run or cannot be read."""

    name: str
    recipe: Recipe | None
    history: History


def read_compared(paths: RunPaths) -> Compared:
    """Read a run to the end of its log. Takes about a second for 100 000 steps."""
    try:
        job = read_job(paths)
    except BadInput:
        job = None
    recipe = job if isinstance(job, Recipe) else None
    return Compared(plain(paths.name, one_line=True), recipe, read_history(paths))


def difference_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return the fields in which the recipes differ, each with one value per run; the name is no difference."""
    rows = []
    for path in PATHS:
        values = [None if run.recipe is None else run.recipe.get(path) for run in runs]
        if path != "name" and any(value != values[0] for value in values):
            rows.append((path, *(_shown(value) for value in values)))
    return rows


def outcome_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return what came of the runs, each row with one value per run."""
    histories = [run.history for run in runs]
    return [
        ("steps", *(f"{history.last_step}/{history.total_steps or '?'}" for history in histories)),
        ("held-out loss", *(number(h.evals[-1].loss) if h.evals else UNKNOWN for h in histories)),
        ("training loss", *(number(h.train.losses[-1]) if h.train.losses else UNKNOWN for h in histories)),
        ("peak, GiB", *(gib(_peak(history)) for history in histories)),
    ]


def _peak(history: History) -> float | None:
    peaks = [peak for peak in history.memory.peak_bytes if peak == peak]  # noqa: PLR0124  NaN is no reading
    return max(peaks, default=None)


def _shown(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "on" if value else "off"
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return plain(text or "(empty)", one_line=True, limit=_LONGEST)
