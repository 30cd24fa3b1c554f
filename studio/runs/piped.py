"""A process that is asked and answers over pipes: a JSON object a line in both directions.

It has pipes instead of a run directory or a port. It leaves nothing to come back to, so it must end when the process
that asks has ended, in whatever way: a pipe tells it. And nobody else on the machine can use a pipe.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.failure import Doing
from studio.runs.last_words import reason_in
from studio.runs.supervise import child_environment

Event = TypeVar("Event")
_LEAVE_SECONDS = 2.0
_LAST_CHARACTERS = 16_000


@dataclass(frozen=True, slots=True)
class Loading:
    """What the process needs is being loaded or read."""

    detail: str = ""
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class NotAnswered:
    """What was asked could not be answered, or (`fatal`) the process ends."""

    message: str
    advice: str = ""
    fatal: bool = True
    bad_input: bool = False


def event_line(event: Any) -> str:
    """Return an event, a dataclass, as one line of JSON."""
    return json.dumps({"kind": type(event).__name__, **asdict(event)})


def event_in(line: str, kinds: Mapping[str, type[Any]]) -> Any:
    """Return the event of a line, with lists as tuples; None for any other line.

    Args:
        line: What the process wrote.
        kinds: The events that are known, by the names of their classes.
    """
    try:
        table = json.loads(line)
        kind = kinds[table.pop("kind")]
        known = {item.name for item in fields(kind)}
        return kind(**{key: _frozen(value) for key, value in table.items() if key in known})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class PipedProcess(Generic[Event]):
    """The parent's end. Use as a context: leaving it ends the process."""

    def __init__(
        self,
        module: str,
        first: Mapping[str, Any],
        *,
        name: str,
        kinds: Mapping[str, type[Event]],
        failed: Callable[[str, str], Event],
        environment: Mapping[str, str] | None = None,
        here: bool = False,
    ) -> None:
        """Start the process.

        Args:
            module: Its Python module.
            first: The first line that it reads.
            name: What is going on, for messages: `chat`.
            kinds: The events that it may write, by the names of their classes.
            failed: Makes the event of its end, of a message and advice.
            environment: What is added to its environment.
            here: Whether it works in the current folder, so that relative paths mean the same to it.

        Raises:
            StudioError: It cannot be started.
        """
        self._name, self._failed = name, failed
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._events: queue.Queue[Event | None] = queue.Queue()
        try:
            self._process: Any = subprocess.Popen(
                [sys.executable, *(("-P",) if here else ()), "-m", module],  # -P: no module is taken from that folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=child_environment(dict(environment or {})),
                cwd=None if here else Path.home(),
                # Ctrl-C is for the parent alone: it stops an answer, not the process that gives it.
                start_new_session=sys.platform != "win32",
            )
        except OSError as error:
            raise StudioError(f"the {name}'s process cannot be started: {error.strerror or error}.") from error
        threading.Thread(target=self._listen, args=(kinds,), daemon=True).start()
        self._send(first)

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()

    def next_event(self, seconds: float) -> Event | None:
        """Return the next event, None if none came in time; after the process has ended, the reason why."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event is None:
            self._events.put(None)
            return self._ended()
        return event

    def events(
        self, *, until: type[Any] | tuple[type[Any], ...], poll: Callable[[], None] = lambda: None
    ) -> Iterator[Event]:
        """Yield events up to the first of a kind, or a fatal failure; `poll` is called in between."""
        while True:
            event = self.next_event(0.1)
            poll()
            if event is None:
                continue
            yield event
            if isinstance(event, until) or getattr(event, "fatal", False):
                return

    def close(self) -> None:
        """End the process at once: it has nothing to save."""
        if self._process.poll() is None:
            self._process.kill()
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            return
        finally:
            for stream in (self._process.stdin, self._errors):
                try:
                    stream.close()
                except (OSError, ValueError):  # ValueError: another thread has closed it meanwhile
                    continue

    def _send(self, table: Mapping[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(table) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            return  # it has ended: the events say so

    def _listen(self, kinds: Mapping[str, type[Event]]) -> None:
        try:
            for line in self._process.stdout:
                event = event_in(line, kinds)
                if event is not None:
                    self._events.put(event)
        except (OSError, ValueError):
            pass
        self._process.wait()
        self._events.put(None)

    def _ended(self) -> Event:
        """Return why the process is gone, as far as its last lines tell: native code ends it without an event."""
        code = self._process.poll()
        killed = " (the system does that when its memory is full)" if code == -9 else ""
        again = f"start the {self._name} again"
        try:
            self._errors.seek(0, 2)
            self._errors.seek(max(0, self._errors.tell() - _LAST_CHARACTERS))
            said = self._errors.read().decode("utf-8", "replace").strip()
        except (OSError, ValueError):
            said = ""
        if reason := reason_in(said.splitlines(), Doing(self._name), then=f"then {again}"):
            return self._failed(f"the {self._name}'s process has ended: {reason}", reason.advice)
        last = plain(said.splitlines()[-1], one_line=True, limit=300) if said else ""
        words = f", exit code {code}{killed}{': ' + last if last else ''}"
        return self._failed(f"the {self._name}'s process has ended{words}", again)
