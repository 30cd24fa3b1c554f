"""Runs that wait for a free card: where they may run, who is there now, and new workers for those that died waiting."""

from collections.abc import Mapping
from typing import Any

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.launch.kinds import Checked, kind_named
from studio.probe.device import CHOSEN, Place, look, place_of, visible_cards
from studio.probe.models import find_base
from studio.probe.plan import plan_for
from studio.runs import supervise
from studio.runs.control import request
from studio.runs.job import kind_of_run
from studio.runs.layout import RunPaths
from studio.runs.queue import CPU, Queue, place_key


def key_of(place: Place) -> str:
    """Return the key under which a place's jobs hold it."""
    return place_key(place.visible or "")


def at_work(place: Place) -> list[RunPaths]:
    """Return the runs that are at work on the card of a place; none for the CPU, which takes several at once."""
    return [] if key_of(place) == CPU else Queue().at_work(key_of(place))


def places_for(checked: Checked[Any]) -> Mapping[str, Mapping[str, str]]:
    """Return where a job may run, best first: the place of its check, and other visible cards on which its plan fits.

    Only a recipe that leaves the choice open (`auto` or `cuda`) has more than one.
    """
    places = {key_of(checked.place): checked.place.environment}
    job = checked.job
    if not isinstance(job, Recipe) or job.device.device not in ("auto", "cuda") or checked.place.card is None:
        return places
    sight = look()
    if CHOSEN in sight.environ:  # this process was given one card, and what it starts stays there
        return places
    base = find_base(job.model.base, job.model.revision)
    for number in range(len(visible_cards(sight).cards)):
        place = place_of(f"cuda:{number}", sight)
        if not place.refusal and key_of(place) not in places and plan_for(job, base, place=place).get("fits"):
            places[key_of(place)] = place.environment
    return places


def join(paths: RunPaths, places: Mapping[str, Mapping[str, str]]) -> None:
    """Put a run at the end of the queue; its worker will wait.

    Raises:
        StudioError: The queue's file cannot be written.
        OSError: The run's folder cannot be written.
    """
    request(paths, "queued")
    Queue().add(paths, places)


def relaunch_waiting(module: str | None = None, **launching: Any) -> tuple[list[RunPaths], list[tuple[RunPaths, str]]]:
    """Start a worker for every run in the queue whose worker has died, as all have after a reboot.

    Args:
        module: The jobs' module; None takes that of each one's kind.
        launching: Further arguments of `studio.runs.supervise.launch`.

    Returns:
        The runs that wait again, and those that could not be started, each with the reason.
    """
    started: list[RunPaths] = []
    refused: list[tuple[RunPaths, str]] = []
    for entry in Queue().waiting():
        if entry.alive:
            continue
        try:
            environment = {**next(iter(entry.places.values())), **(launching.get("environment") or {})}
            own = module or kind_named(kind_of_run(entry.run)).module
            supervise.launch(entry.run, own, **{**launching, "environment": environment})
        except (StudioError, OSError) as error:
            refused.append((entry.run, str(error)))
        else:
            started.append(entry.run)
    return started, refused
