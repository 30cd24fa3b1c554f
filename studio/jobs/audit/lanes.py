"""Trains the lanes of a race: real training runs of one recipe, one after the other, each in a process of its own."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Phase
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.failures import Cancelled
from studio.probe.audit import recipe_of_race
from studio.runs.atomic import read_object, write_whole
from studio.runs.control import request
from studio.runs.launched import resume_run, start_run
from studio.runs.layout import RunPaths
from studio.runs.requests import LANES, AuditRequest
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
from studio.runs.watch import RunWatch
from studio.runs.worker import Worker

MIXED = "qlora+mixed"
TRAINING_SHARE = 0.85
"""Share of the race's progress that is training; the rest is measuring."""
_POLL_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Lane:
    """A lane whose training has ended."""

    name: str
    recipe: Recipe
    paths: RunPaths
    watch: RunWatch


def lane_recipe(recipe: Recipe, name: str, among: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a lane, which differs from the race's in the method only.

    Args:
        recipe: The recipe of the race.
        name: The lane's name, of `LANES`.
        among: All lanes of the race. If the mixed one is among them, the others have 4 bits everywhere, so that what
            it wins shows against them.

    Raises:
        BadInput: The lane cannot be made from this recipe.
    """
    method, _, start = name.partition("+")
    turned = recipe.with_("method", method).with_("name", f"{recipe.name}-{name.replace('+', '-')}")
    if name == MIXED and not recipe.model.precision:
        raise BadInput(
            f"the lane {MIXED} holds in other bits what model.precision names, and it names nothing: take the worst "
            "blocks that lora-studio audit base finds."
        )
    if MIXED in among and name != MIXED:
        turned = turned.with_("model.precision", ())
    if start == "loftq":
        turned = turned.with_("adapter.init", start)
    elif recipe.adapter.init in ("pissa", "loftq"):
        # PiSSA needs LoRA and LoftQ needs QLoRA; lanes of both methods must start alike.
        turned = turned.with_("adapter.init", "default")
    if problems := turned.problems():
        raise BadInput(f"the lane {name} cannot be run: {plain(str(problems[0]), one_line=True)}")
    return turned


def train_lanes(worker: Worker, request: AuditRequest) -> list[Lane]:
    """Train every lane of a race to its end; lanes that an interrupted race has begun are resumed.

    Args:
        worker: Of the race; gets the progress, and is asked whether to stop.
        request: Names the recipe and the lanes.

    Raises:
        BadInput: The recipe cannot be used, or a lane cannot be started.
        JobFailed: A lane ended without an adapter.
        Cancelled: The user asked for a stop; the lane was asked to stop too.
    """
    recipe = recipe_of_race(request)
    request.check_lanes()
    names = request.lanes
    recipes = {name: lane_recipe(recipe, name, names) for name in names}
    known = _known(worker)
    lanes = []
    for place, (name, turned) in enumerate(recipes.items()):
        paths = RunPaths(Path(known[name])) if name in known else None
        if paths is None or not paths.exists:
            paths = start_run(turned, Path(worker.paths.root).parent)
            known[name] = str(paths.root)
            write_whole(worker.paths.lanes, json.dumps(known))
        elif run_status(paths) in (Status.crashed, Status.stopped, Status.failed):
            resume_run(paths)
        watch = RunWatch(paths)
        _wait(worker, watch, partial(_tell, worker, watch, name, (place, len(names))))
        lanes.append(Lane(name, turned, paths, watch))
    worker.emit(Phase, name="measuring the lanes", fraction=TRAINING_SHARE)
    return lanes


def _wait(worker: Worker, watch: RunWatch, tell: Callable[[], None]) -> None:
    asked = False
    while run_status(watch.paths).live:
        if worker.requested("stop") and not asked:
            request(watch.paths, "stop")
            asked = True
        before = watch.history.last_step
        watch.poll()
        if watch.history.last_step != before:
            tell()
        time.sleep(_POLL_SECONDS)
    watch.catch_up()
    if asked:
        raise Cancelled("stopped; resuming goes on with the lane that was stopped")
    status = run_status(watch.paths)
    if status is not Status.finished:
        failure = summary_of(watch.paths, watch.history, status)["failure"] or {}
        name = plain(watch.paths.name, one_line=True)
        said = plain(str(failure.get("message", status)), one_line=True, limit=300)
        raise JobFailed("lane_failed", f"the run {name} {status}: {said}", f"look at: lora-studio runs show {name}")


def _tell(worker: Worker, watch: RunWatch, name: str, place: tuple[int, int]) -> None:
    history = watch.history
    step, total = history.last_step, history.total_steps or 0
    done = (place[0] + (step / total if total else 0.0)) / place[1]
    loss = f"  loss {history.train.losses[-1]:.4f}" if history.train.losses else ""
    worker.emit(
        Phase, name="racing", fraction=TRAINING_SHARE * done, detail=f"{name}: step {step}/{total or '?'}{loss}"
    )


def _known(worker: Worker) -> dict[str, str]:
    table = read_object(worker.paths.lanes)
    return {name: path for name, path in table.items() if name in LANES and isinstance(path, str)}
