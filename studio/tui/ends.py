"""Jobs that end while nobody looks at them: which they are, and what is said of each, once.

A warning, such as an export's of a larger loss, stands on the screen of its job. Who has left that screen, or the
whole studio, is told when the job has ended.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textual.app import App

from studio.core.notice import desktop_notice
from studio.core.text import plain
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.runs.store import RunInfo, list_runs, run_info, runs_in
from studio.tui.readable import duration, number
from studio.tui.screens.offers import OfferingScreen
from studio.tui.services import Services

_BAD = (Status.failed, Status.crashed)
_LONGEST = 400
_MOST_WARNINGS = 3
_MOST_TOLD = 3
_NOTICE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Ending:
    """A run that has ended.

    Attributes:
        paths: The run.
        words: What is said of it.
        severity: `information`, `warning` or `error`, as Textual has it.
    """

    paths: RunPaths
    words: str
    severity: Literal["information", "warning", "error"]


class Ends:
    """Follows the runs of a folder, also those that another terminal or another run starts there.

    It reads files, so it is asked from a thread.
    """

    def __init__(self, root: Path) -> None:
        """Follow the runs in a folder; nothing is read yet."""
        self._root = root
        self._known: dict[str, int] = {}
        self._live: dict[str, RunPaths] = {}

    def begin(self, since: float | None) -> tuple[list[RunInfo], list[Ending]]:
        """Return the runs that are alive, and of those that ended after `since` (unix seconds) what must be told.

        That is what failed, and what warned. The others ended as they should, which the list of runs says.
        """
        self._known = self._launches()
        infos = list_runs(self._root)
        # Those that are at work before those that wait for them.
        live = sorted((info for info in infos if info.status.live), key=lambda info: info.status is Status.queued)
        self._live = {info.name: info.paths for info in live}
        after = math.inf if since is None else since
        ended = (info for info in infos if not info.status.live and (info.last_at or 0.0) > after)
        return live, [ending_of(info) for info in ended if info.status in _BAD or info.warnings]

    def look(self) -> list[Ending]:
        """Return the runs that have ended since the last look."""
        before, self._known = self._known, self._launches()
        for name, at in self._known.items():
            if at != before.get(name):
                self._live[name] = RunPaths(self._root / name)
        infos = [run_info(paths) for paths in self._live.values()]
        ended = [info for info in infos if not info.status.live]
        for info in ended:
            del self._live[info.name]
        return [ending_of(info) for info in ended]

    def _launches(self) -> dict[str, int]:
        """Return by a run's name when its worker was launched, in nanoseconds: a resumed run is followed again."""
        found: dict[str, int] = {}
        for paths in runs_in(self._root):
            with contextlib.suppress(OSError):
                found[paths.name] = paths.launch.stat().st_mtime_ns
        return found


class EndNotices:
    """Rings the bell at the end of a run, notifies the desktop, and tells of it unless the screen shows it."""

    def __init__(self, app: App[None], root: Path, services: Services) -> None:
        """Watch for an app over the runs in a folder; `services` keep when that was."""
        self._app, self._services = app, services
        self._ends = Ends(root)
        self._looks = False
        self._looked_at: float | None = None

    def begin(self, found_live: Callable[[list[RunPaths]], None]) -> None:
        """Hand on the runs that are alive, the newest first, or that there are none; tell what has failed meanwhile."""

        def begin() -> None:
            looked_at = time.time()
            live, endings = self._ends.begin(self._services.recall_visit())
            self._looked_at = looked_at
            self._app.call_later(found_live, [info.paths for info in live])
            if endings:
                self._app.call_later(self._tell, endings)

        self._app.run_worker(begin, thread=True)

    def look(self) -> None:
        """Look for runs that have ended, unless the look before still goes on."""

        def look() -> None:
            looked_at = time.time()
            try:
                endings = self._ends.look()
            finally:
                self._looks = False
            self._looked_at = looked_at
            if endings:
                self._app.call_later(self._tell, endings, ring=True)

        if self._looked_at is not None and not self._looks:
            self._looks = True
            self._app.run_worker(look, thread=True)

    def close(self) -> None:
        """Keep when the runs were looked at last: the next visit tells what has ended badly since."""
        if self._looked_at is not None:
            with contextlib.suppress(OSError):  # the next visit then tells some of it again
                self._services.keep_visit(self._looked_at)

    def _tell(self, endings: Sequence[Ending], *, ring: bool = False) -> None:
        screen = self._app.screen
        watched = screen.watched if ring and isinstance(screen, OfferingScreen) else ()
        if ring and endings:
            self._app.bell()
            more = f" ... and {len(endings) - 1} more" if len(endings) > 1 else ""
            self._notice(f"{endings[0].words.partition(chr(10))[0]}{more}")
        told = [ending for ending in endings if ending.paths not in watched]
        for ending in told[:_MOST_TOLD]:
            self._app.notify(ending.words, severity=ending.severity, timeout=_NOTICE_SECONDS, markup=False)
        if len(told) > _MOST_TOLD:
            self._app.notify(f"{len(told) - _MOST_TOLD} more runs have ended: o lists them.", markup=False)

    def _notice(self, words: str) -> None:
        """Let the terminal show a desktop notification: Textual has no call for it."""
        driver = self._app._driver
        if driver is not None and (sequence := desktop_notice(words, os.environ)):
            driver.write(sequence)


def ending_of(info: RunInfo) -> Ending:
    """Return what is said of a run that has ended."""
    took = info.last_at - info.started_at if info.last_at and info.started_at else None
    after = f" after {duration(took)}" if took is not None else ""
    head = f"{plain(info.name, one_line=True)} {_ended(info)}{after}{_came_of_it(info)}."
    told = [f"\n{plain(words, one_line=True, limit=_LONGEST)}" for words in info.warnings[:_MOST_WARNINGS]]
    more = len(info.warnings) - len(told)
    rest = f"\n{more} more warning{'s' * (more != 1)} under Notes." if more else ""
    words = "".join([head, *told, rest])
    return Ending(info.paths, words, "error" if info.status in _BAD else "warning" if told else "information")


def _ended(info: RunInfo) -> str:
    if info.status is Status.stopped:
        return "was stopped"
    why = f" ({plain(info.failure, one_line=True, limit=60)})" if info.failure else ""
    return f"{'has ' if info.status is not Status.finished else ''}{info.status}{why}"


def _came_of_it(info: RunInfo) -> str:
    if info.status in _BAD or info.eval_loss is None or not math.isfinite(info.eval_loss):
        return ""
    before = info.first_eval_loss
    since = f"{number(before)} -> " if before is not None and before != info.eval_loss else ""
    return f", held-out loss {since}{number(info.eval_loss)}"
