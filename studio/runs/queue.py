"""Runs that wait for a card, and which jobs are at work on which card: a launch on a busy card may wait its turn.

There is no daemon. The worker of a queued run lives already and waits before it loads anything; once a second it looks
whether its turn has come. So a card that falls free is taken whatever has ended its job. What outlives a reboot is the
request `queued` in the run's `control` folder, and the order in a file:

    <home>/queue/order.json      the runs that wait: first come, first served, unless they were moved
    <home>/queue/order.lock      held for a moment by whoever changes the order or takes a place
    <home>/queue/places/KEY/     a file for each job that is at work on the card KEY, locked while the job lives
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.runs.atomic import read_object, write_whole
from studio.runs.control import requested, withdraw
from studio.runs.home import studio_home
from studio.runs.layout import RunPaths, slug
from studio.runs.lock import lock_held

if TYPE_CHECKING:
    from filelock import FileLock

CPU = "cpu"
"""The key of the place of jobs that use no card."""
_SCHEMA = 1
_LOCK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A run that waits for its turn.

    Attributes:
        run: The run.
        places: Where it may run, best first: the card's key, and what the job's environment must hold to see that card
            alone.
    """

    run: RunPaths
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether its worker waits. It does not after a reboot, until `lora-studio runs queue resume`."""
        return lock_held(self.run.lock)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a waiting run has found.

    Attributes:
        hold: The lock on the place that it has taken; None where it waits on.
        environment: What its environment must hold now.
        before: How many runs are before it.
        at_work: The names of the jobs on the places that it may take.
    """

    hold: "FileLock | None" = None
    environment: Mapping[str, str] = field(default_factory=dict)
    before: int = 0
    at_work: tuple[str, ...] = ()


def place_key(word: str) -> str:
    """Return the key of a card from what a mask calls it: its UUID or number; empty means the CPU."""
    return word or CPU


class Queue:
    """The queue of this home folder. Every change is one turn of the lock, and the file appears whole."""

    def __init__(self, home: Path | None = None) -> None:
        """Nothing is read or made yet; None means the home folder of this process."""
        self._root = (home or studio_home()) / "queue"
        self._order = self._root / "order.json"

    def waiting(self) -> list[Waiting]:
        """Return the runs that wait, in order; also those whose worker has died, which keep their place."""
        document = read_object(self._order)
        items = document.get("waiting") if document.get("schema") == _SCHEMA else None
        entries = [entry for item in items or () if (entry := _entry(item)) is not None]
        return [entry for entry in entries if requested(entry.run, "queued")]

    def at_work(self, key: str) -> list[RunPaths]:
        """Return the runs of the jobs that are at work on a card, by name."""
        with suppress(OSError):
            held = [file for file in (self._root / "places" / slug(key)).iterdir() if lock_held(file)]
            found = (RunPaths(Path(file.read_text(encoding="utf-8", errors="replace"))) for file in held)
            return sorted(found, key=lambda paths: paths.name)
        return []

    def add(self, run: RunPaths, places: Mapping[str, Mapping[str, str]]) -> None:
        """Put a run at the end of the queue.

        Raises:
            StudioError: The order cannot be written.
        """
        with self._changing() as entries:
            entries[:] = [*(entry for entry in entries if entry.run != run), Waiting(run, places)]

    def move(self, run: RunPaths, to: int) -> None:
        """Give a waiting run another place in the queue: 0 is the first, and a larger number than there are the last.

        Raises:
            BadInput: The run does not wait.
            StudioError: The order cannot be written.
        """
        with self._changing() as entries:
            own = next((entry for entry in entries if entry.run == run), None)
            if own is None:
                raise not_waiting(run)
            entries.remove(own)
            entries.insert(to, own)

    def remove(self, run: RunPaths) -> None:
        """Take a run out of the queue; nothing happens where it does not wait.

        Raises:
            StudioError: The order cannot be written.
        """
        withdraw(run, "queued")
        with self._changing() as entries:
            entries[:] = [entry for entry in entries if entry.run != run]

    def take(self, run: RunPaths, key: str) -> "FileLock | None":
        """Mark a job as at work on a card, beside whatever else is there; None where it cannot be marked."""
        with suppress(OSError, StudioError), self._locked():
            return self._hold(run, key)
        return None

    def take_turn(self, run: RunPaths, otherwise: str = CPU) -> Turn:
        """Take a free place for a waiting run if its turn has come, and leave the queue.

        Every run before it has the first choice among the free places, also one that has not looked yet. A run that is
        not in the order, because the file was lost, goes behind all that are, and waits for the card `otherwise`.

        Raises:
            StudioError: The queue's files cannot be written.
        """
        with self._changing() as entries:
            own = next((entry for entry in entries if entry.run == run), Waiting(run, {otherwise: {}}))
            free = {key for entry in (*entries, own) for key in entry.places if not self.at_work(key)}
            before = 0
            for entry in entries:
                if entry.run == run:
                    break
                if not entry.alive or not (entry.places.keys() & own.places.keys()):
                    continue
                before += 1
                free.discard(next((key for key in entry.places if key in free), ""))
            chosen = next((key for key in own.places if key in free), None)
            if chosen is None:
                busy = [paths.name for key in own.places for paths in self.at_work(key)]
                return Turn(before=before, at_work=tuple(dict.fromkeys(busy)))
            hold = self._hold(run, chosen)
            withdraw(run, "queued")
            entries[:] = [entry for entry in entries if entry.run != run]
            return Turn(hold, own.places[chosen])

    def _hold(self, run: RunPaths, key: str) -> "FileLock":
        """Lock a run's file among those of a card, and remove the files of jobs that have ended."""
        from filelock import FileLock  # noqa: PLC0415  0.1 s that who only looks need not pay

        folder = self._root / "places" / slug(key)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = folder / hashlib.sha256(str(run.root).encode(errors="surrogateescape")).hexdigest()[:16]
        for file in folder.iterdir():
            if file != own and not lock_held(file):
                file.unlink(missing_ok=True)
        lock = FileLock(own, timeout=_LOCK_SECONDS, mode=0o600, thread_local=False)
        lock.acquire()
        own.write_bytes(str(run.root).encode(errors="surrogateescape"))
        return lock

    @contextmanager
    def _changing(self) -> Iterator[list[Waiting]]:
        """Give the entries to be changed in place; the order is written where they have changed."""
        with self._locked():
            entries = self.waiting()
            before = list(entries)
            yield entries
            if entries == before:
                return
            items = [{"run": str(entry.run.root), "places": entry.places} for entry in entries]
            write_whole(self._order, json.dumps({"schema": _SCHEMA, "waiting": items}, indent=1) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout  # noqa: PLC0415  as above

        shown = plain(str(self._root), one_line=True)
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self._root / "order.lock", timeout=_LOCK_SECONDS, mode=0o600):
                yield
        except Timeout as error:
            raise StudioError(f"the queue in {shown} was held by another process for {_LOCK_SECONDS:g} s.") from error
        except OSError as error:
            raise StudioError(f"the queue in {shown} cannot be written: {error.strerror or error}.") from error


def not_waiting(run: RunPaths) -> BadInput:
    """Return the error for a run that is not in the queue."""
    name = plain(run.name, one_line=True)
    return BadInput(f"the run {name} does not wait in the queue; lora-studio runs queue list shows those that do.")


def wait_for_turn(
    run: RunPaths,
    stopped: Callable[[], bool],
    tell: Callable[[Turn], None],
    sleep: Callable[[float], None],
    *,
    patiently: Callable[[Callable[[], Turn]], Turn] = lambda attempt: attempt(),
    queue: Queue | None = None,
    otherwise: str = CPU,
) -> Turn | None:
    """Wait until a run has a place of its own; None where it was cancelled.

    Args:
        run: A run that waits.
        stopped: Returns whether the user does not want it any more.
        tell: Told what has been found whenever that has changed.
        sleep: Waits for so many seconds.
        patiently: Repeats an attempt that a disk refuses.
        queue: The queue; None takes that of this process's home folder.
        otherwise: The card that the run was launched for, by which it waits where the order does not hold it.

    Raises:
        StudioError: The queue's files cannot be written.
    """
    queue = queue or Queue()
    told: Turn | None = None
    while not stopped():
        turn = patiently(lambda: queue.take_turn(run, otherwise))
        if turn.hold is not None:
            return turn
        if turn != told:
            tell(turn)
            told = turn
        sleep(1.0)
    queue.remove(run)
    return None


def _entry(item: Any) -> Waiting | None:
    """Return an entry of the file; None where it is not sound."""
    try:
        places = {str(key): {str(name): str(value) for name, value in of.items()} for key, of in item["places"].items()}
        return Waiting(RunPaths(Path(item["run"])), places) if places else None
    except (TypeError, KeyError, AttributeError, ValueError):
        return None
