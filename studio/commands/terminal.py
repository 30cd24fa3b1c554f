"""Writing to a terminal or a pipe: texts and numbers, what a terminal can show, and Ctrl-C."""

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from studio.core.text import duration_text, plain

DONE, NO, BAD_INPUT = 0, 1, 2
"""Exit codes: done or fits; the answer is no; what the user gave cannot be used."""

_DRIVER_VARIABLE = "TEXTUAL_DRIVER"
_GLYPHS = "━╺█⣿┌…"
_ASCII = str.maketrans(dict.fromkeys("┌┐└┘├┤┬┴┼", "+") | {"─": "-", "│": "|"})


def say(text: str = "", *, to: TextIO | None = None) -> None:
    """Write a line for people. Control characters are made visible, and a pipe gets the line at once."""
    stream = to or sys.stdout
    try:
        print(plain(text), file=stream, flush=True)
    except OSError:
        if stream is not sys.stderr:
            raise
        # The answer on stdout must come even where nobody can take the diagnostics (`2>/dev/full`, a pipe whose reader
        # left). So from now on stderr goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def complain(text: str) -> None:
    """Write a line to stderr."""
    say(text, to=sys.stderr)


def agreed(question: str) -> bool:
    """Ask on stderr, and return whether the answer is yes."""
    return asked(question) in ("y", "yes")


def asked(question: str) -> str:
    """Ask on stderr, so that the question does not get into a pipe; return the answer in small letters."""
    print(plain(question), end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:  # the input has ended, so no enter has ended the line of the question
        say(to=sys.stderr)
    return line.strip().lower()


def write_json(document: Any) -> None:
    """Write the one JSON document of `--json`; ASCII only, so that no encoding can spoil it."""
    print(json.dumps(document, indent=2, allow_nan=False, default=str), flush=True)


def width_of_terminal() -> int:
    """Return the columns to write for: those of the terminal or of `COLUMNS`, between 40 and 200."""
    return min(200, max(40, shutil.get_terminal_size((80, 24)).columns))


def is_rich(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether colours and block glyphs are welcome: a terminal, not dumb, without NO_COLOR, in UTF-8."""
    dumb = environment.get("TERM", "") == "dumb" or bool(environment.get("NO_COLOR"))
    return stream.isatty() and not dumb and can_encode(stream)


def can_encode(stream: TextIO) -> bool:
    """Return whether the stream's encoding carries the glyphs of gauges and plots."""
    try:
        _GLYPHS.encode(stream.encoding or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def as_ascii(text: str) -> str:
    """Return a plot with its frame in ASCII, for encodings that lack the box characters."""
    return text.translate(_ASCII)


def why_no_studio(environment: Mapping[str, str] = os.environ) -> str:
    """Return why the full-screen studio cannot be shown here, or nothing when it can."""
    if environment.get(_DRIVER_VARIABLE):  # textual-serve: a browser is the terminal
        return ""
    # Textual reads keys from stdin and draws on stderr.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        return "the studio needs a terminal, and this is none"
    if sys.platform != "win32" and environment.get("TERM", "") in ("", "dumb"):
        return f"the studio needs a terminal that can move its cursor, and TERM is {environment.get('TERM', '')!r}"
    return ""


def duration(seconds: float | None) -> str:
    """Return seconds as a person says them: `4.2 s`, `42 s`, `3 min 05 s`, `2 h 07 min`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    return f"{seconds:.1f} s" if seconds < 9.95 else duration_text(seconds)


def size(size_bytes: float | None) -> str:
    """Return bytes as a person reads them, in binary units."""
    if size_bytes is None:
        return "?"
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"


def number(value: float | None, form: str = ".4f") -> str:
    """Return a number, or a dash where it is not known."""
    return "-" if value is None else format(value, form)


def table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns, the first row being the head."""
    safe = [[plain(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in safe) for column in range(len(safe[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in safe
    )


class WaitLine:
    """A line about work that takes longer than a second: `reading the data: 42 %`, rewritten in a terminal.

    Where no terminal is, a line is written each ten seconds. It is removed when the work ends.
    """

    def __init__(self, what: str, to: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._to, self._clock = what, to, clock
        self._next = clock() + 1.0
        self._written = False

    def __enter__(self) -> Self:
        """Begin to wait."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the line."""
        if self._written and self._to.isatty():
            self._to.write("\r\x1b[K")
            self._to.flush()

    def __call__(self, done: int, total: int) -> None:
        """Tell how much is done."""
        if (now := self._clock()) < self._next:
            return
        rewritten = self._to.isatty()
        self._next, self._written = now + (0.2 if rewritten else 10.0), True
        line = f"{self._what}: {100 * done / max(1, total):.0f} %"
        if rewritten:
            self._to.write(f"\r{line}\x1b[K")
            self._to.flush()
        else:
            say(line, to=self._to)


class Interrupts:
    """Context in which Ctrl-C is only counted. Outside the main thread Python allows no handler: nothing changes there.

    Attributes:
        count: How often Ctrl-C came.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: Any = None

    def __enter__(self) -> Self:
        """Take the handler."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the handler back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
