"""A training's guard as its run's folder shows it: how often it has restarted the run, why, and what it waits for now.

The guard (`studio.launch.guard`) is a process that lives beside the worker and alone writes `restarts.json`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from studio.core.events import Restarted, Warned
from studio.runs.atomic import read_object, write_whole
from studio.runs.layout import RunPaths
from studio.runs.process import is_alive, mark_to_json, read_mark

RESTARTED = "LORA_STUDIO_RESTARTED"
"""Environment variable that tells a worker that the guard has started it: which time, of how many, and why, as JSON."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """What the guard of a run last wrote.

    Attributes:
        alive: Whether it watches: the run goes on by itself after a crash.
        used: How often it has restarted the run.
        times: How often it may.
        words: What it waits for, or why it gave up; empty while the run works.
    """

    alive: bool
    used: int
    times: int
    words: str


def read_guard(paths: RunPaths) -> Guarded | None:
    """Return how a run is guarded; None where it never was."""
    mark = read_mark(paths.restarts)
    table = read_object(paths.restarts)
    used, times, words = table.get("used"), table.get("times"), table.get("words")
    if mark is None or not (isinstance(used, int) and isinstance(times, int) and isinstance(words, str)):
        return None
    return Guarded(not table.get("over") and is_alive(mark[0]), used, times, words)


def write_guard(paths: RunPaths, mark: Any, *, used: int, times: int, words: str = "", over: bool = False) -> None:
    """Write how a run is guarded.

    Args:
        paths: The run.
        mark: The guard's process.
        used: As in `Guarded`.
        times: As in `Guarded`.
        words: As in `Guarded`.
        over: Whether the guard ends now.

    Raises:
        OSError: The disk refuses.
    """
    write_whole(paths.restarts, mark_to_json(mark, used=used, times=times, words=words, over=over))


def tell_restart(emit: Callable[..., None]) -> None:
    """Emit that the guard has started this worker, where it has; called once the worker has said that it starts."""
    try:
        table = json.loads(os.environ.pop(RESTARTED, ""))
        number, of, because = int(table["number"]), int(table["of"]), str(table["because"])
    except (ValueError, TypeError, KeyError):
        return
    emit(Restarted, number=number, of=of, because=because)
    emit(Warned, topic="restart", message=f"restarted by itself, {number} of {of} times, after {because}")
