"""What the screens can set in motion, as plain callables, so that tests set nothing in motion.

The real ones import what they need when they are called: none of it is needed for the first frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.text import plain
from studio.runs.layout import RunPaths

if TYPE_CHECKING:
    from studio.core.shape import ModelShape
    from studio.runs.last_recipe import LastRecipe
    from studio.tui.forecast import Forecaster

_NO_GRACE = 0.0


def _start(recipe: Recipe, runs_root: Path) -> RunPaths:
    from studio.launch.start import start  # noqa: PLC0415  0.15 s

    return start(recipe, runs_root)


def _resume(paths: RunPaths) -> None:
    from studio.launch.start import resume  # noqa: PLC0415  0.1 s

    resume(paths)


def _start_over(paths: RunPaths) -> None:
    from studio.launch.start import resume  # noqa: PLC0415  0.1 s

    resume(paths, from_start=True)


def _end_now(paths: RunPaths) -> None:
    from studio.runs.supervise import stop  # noqa: PLC0415  0.1 s

    stop(paths, _NO_GRACE)


def _card() -> str:
    from studio.probe.device import look, place_of  # noqa: PLC0415  0.06 s

    sight = look()
    place = place_of("auto", sight)
    gpu, more = place.card, f" (+{len(sight.cards) - 1})" if sight.cards and len(sight.cards) > 1 else ""
    if gpu is None:
        return "no card can be used: lora-studio doctor" if place.refusal else "no NVIDIA card: the CPU"
    if place.refusal:
        return f"{gpu.name}{more} cannot be used: lora-studio doctor"
    total = f" {gpu.total_bytes / 2**30:.1f} GiB" if gpu.total_bytes else ""
    used = f" · {gpu.used_bytes / 2**30:.1f} in use" if gpu.used_bytes is not None else ""
    heat = f" · {gpu.celsius} C" if gpu.celsius is not None else ""
    return f"{gpu.name}{total}{more}{used}{heat}"


def _shape(base: str, revision: str) -> "ModelShape":
    from studio.probe.shape import find_shape  # noqa: PLC0415  0.1 s

    try:
        here = base == EMBEDDED or Path(base).expanduser().exists()
        return find_shape(base, revision) if here else _hub_shape(base, revision)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such home, a NUL
        raise BadInput(f"The model {plain(base, one_line=True, limit=80)} cannot be looked at: {error}.") from None


@lru_cache(maxsize=32)
def _hub_shape(base: str, revision: str) -> "ModelShape":
    """A model of the hub is asked for once: each look at the card would ask again."""
    from studio.probe.shape import find_shape  # noqa: PLC0415

    return find_shape(base, revision)


def _forecaster(recipe: Recipe, planned: str) -> "Forecaster":
    from studio.core.gpu_catalogue import find_gpu  # noqa: PLC0415  0.15 s with the rest
    from studio.probe.device import place_of  # noqa: PLC0415
    from studio.probe.pace import calibrated  # noqa: PLC0415
    from studio.probe.plan import device_from_catalogue, device_of  # noqa: PLC0415
    from studio.tui.forecast import Forecaster  # noqa: PLC0415

    shape = _shape(recipe.model.base, recipe.model.revision)
    device = device_from_catalogue(find_gpu(planned)) if planned else device_of(place_of(recipe.device.device))
    return Forecaster(shape, device, calibrated)


def _spills() -> bool:
    from studio.probe.machine import spills_to_ram  # noqa: PLC0415

    return spills_to_ram()


def _free_ram_bytes() -> int | None:
    from studio.probe.machine import free_ram_bytes  # noqa: PLC0415

    return free_ram_bytes()


def _recall_planned() -> str:
    from studio.tui.kept import recall_planned_card  # noqa: PLC0415

    return recall_planned_card()


def _keep_planned(name: str) -> None:
    from studio.tui.kept import keep_planned_card  # noqa: PLC0415

    keep_planned_card(name)


def _keep_theme(name: str) -> None:
    from studio.tui.kept import keep_theme  # noqa: PLC0415

    keep_theme(name)


def _keep_recipe(last: "LastRecipe") -> None:
    from studio.runs.last_recipe import keep_last_recipe  # noqa: PLC0415  with platformdirs

    keep_last_recipe(last)


@dataclass(frozen=True, slots=True)
class Engine:
    """Starting, continuing and ending runs, and a look at the card. All may take seconds: call them from a thread.

    Attributes:
        start: Checks a recipe, makes its run and launches it; raises StudioError.
        resume: Launches the worker of a stopped or crashed run again; raises StudioError, NoWholeCheckpoint where that
            wants a yes.
        start_over: The same after that yes; raises StudioError.
        end_now: Ends a worker that does not stop when asked.
        card: Says in a few words what the run will run on.
        forecaster: Finds model and card (a name of the catalogue, or empty for this machine's); raises StudioError.
        spills: Whether the driver moves what does not fit into main memory instead of refusing it (Windows, WSL).
        free_ram_bytes: Main memory that a run on the CPU can have, or None.
        recall_planned: Returns the card of the catalogue that was planned for last, or nothing.
        keep_planned: Keeps it for the next visit; raises OSError.
        keep_theme: Keeps a theme's name for the next visit; raises OSError.
        keep_recipe: Keeps the recipe that was turned last for the next visit; raises OSError and BadInput.
    """

    start: Callable[[Recipe, Path], RunPaths] = _start
    resume: Callable[[RunPaths], None] = _resume
    start_over: Callable[[RunPaths], None] = _start_over
    end_now: Callable[[RunPaths], None] = _end_now
    card: Callable[[], str] = _card
    forecaster: "Callable[[Recipe, str], Forecaster]" = _forecaster
    spills: Callable[[], bool] = _spills
    free_ram_bytes: Callable[[], int | None] = _free_ram_bytes
    recall_planned: Callable[[], str] = _recall_planned
    keep_planned: Callable[[str], None] = _keep_planned
    keep_theme: Callable[[str], None] = _keep_theme
    keep_recipe: "Callable[[LastRecipe], None]" = _keep_recipe
