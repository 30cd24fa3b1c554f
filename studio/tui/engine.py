"""What the screens can set in motion, as plain callables, so that tests set nothing in motion.

The real ones import what they need when they are called: none of it is needed for the first frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from studio.core.recipe import Recipe
from studio.runs.layout import RunPaths

_NO_GRACE = 0.0


def _start(recipe: Recipe, runs_root: Path) -> RunPaths:
    from studio.probe.start import start_training  # noqa: PLC0415  0.15 s

    return start_training(recipe, runs_root)


def _resume(paths: RunPaths) -> None:
    from studio.runs.supervise import resume  # noqa: PLC0415  0.1 s

    resume(paths)


def _end_now(paths: RunPaths) -> None:
    from studio.runs.supervise import stop  # noqa: PLC0415  0.1 s

    stop(paths, _NO_GRACE)


def _card() -> str:
    from studio.probe.gpus import read_gpus  # noqa: PLC0415  0.06 s

    gpus = read_gpus()
    if not gpus:
        return "no NVIDIA card: the CPU"
    gpu = gpus[0]
    more = f" (+{len(gpus) - 1})" if len(gpus) > 1 else ""
    total = f" {gpu.total_bytes / 2**30:.1f} GiB" if gpu.total_bytes else ""
    used = f" · {gpu.used_bytes / 2**30:.1f} in use" if gpu.used_bytes is not None else ""
    heat = f" · {gpu.celsius} C" if gpu.celsius is not None else ""
    return f"{gpu.name}{total}{more}{used}{heat}"


@dataclass(frozen=True, slots=True)
class Engine:
    """Starting, continuing and ending runs, and a look at the card. All may take seconds: call them from a thread.

    Attributes:
        start: Checks a recipe, makes its run and launches it; raises StudioError.
        resume: Launches the worker of a stopped or crashed run again; raises StudioError.
        end_now: Ends a worker that does not stop when asked.
        card: Says in a few words what the run will run on.
    """

    start: Callable[[Recipe, Path], RunPaths] = _start
    resume: Callable[[RunPaths], None] = _resume
    end_now: Callable[[RunPaths], None] = _end_now
    card: Callable[[], str] = _card
