"""Runs a model's chat template within limits of time, memory and length.

A template is a program written by strangers: it may never end, or take all memory. Time is limited by a timer signal,
which Python handles between two of its instructions. If a single instruction takes too long (a power of huge numbers),
faulthandler's timer, which does not need the interpreter, ends the process and leaves the stack in `output.log`, where
`studio.runs.last_words` reads it. Memory is limited through the address space that the system grants meanwhile.

Some templates write today's date. What belongs to a training run is rendered with the date of that run's first start,
or else a resume or an audit on another day would read other tokens.
"""

import faulthandler
import json
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from studio.core.errors import BadInput, StudioError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SECONDS = 20.0
_SECONDS_PER_CHAT = 0.02
_SECONDS_PER_CHARACTER = 1e-5
"""Time limits. A conversation of thousands of words takes about one millisecond to render, and about ten to tokenise,
which some calls do as well."""
_LAST_RESORT = 3.0
"""faulthandler's timer waits so many times as long as the signal, which gives the better message."""
_MORE_BYTES = 2 * 2**30
_BYTES_PER_CHARACTER = 500
"""For tokens and their places in the text as Python lists: a token has about 4 characters and a dozen numbers."""
_LEAST_CHARACTERS = 2**20
_LONGER = 64
"""How many times as long as its messages a text may be: templates add a few dozen characters a turn, and a prompt."""
_ANOTHER = "so it cannot be used. Use the tokenizer of another copy of this model."

_DATE = "template_date"
"""The tokenizer's attribute that holds a run's date; it is not saved with the tokenizer."""
_VARIABLES = "template_variables"
"""That which holds the variables that a run tells its chat template."""
_DIRECTIVES = "aAwdbBmyYHIMpSfzZjUWcxXGuVDeFRT"

_ASKED = re.compile(r"strftime_now\s+is\s+(?:not\s+)?defined")
_DATE_CALL = re.compile(r"strftime_now\b(?:\s*\(\s*(?:'([^'\\]+)'|\"([^\"\\]+)\")\s*\))?")

Table = Sequence[dict[str, Any]]


def freeze_date(tokenizer: Any, date: datetime | None) -> None:
    """Render this tokenizer's chat template with a date from now on; with today's where it is None."""
    setattr(tokenizer, _DATE, date)


def set_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """Tell this tokenizer's chat template these variables from now on, where a call does not say otherwise."""
    setattr(tokenizer, _VARIABLES, dict(variables))


def told_template(tokenizer: Any) -> dict[str, Any]:
    """Return what this tokenizer's chat template is told besides the rows: a run's date and variables.

    Whoever keeps what was rendered must keep this with it.
    """
    date = getattr(tokenizer, _DATE, None)
    return {"date": date.isoformat() if date else "", "variables": getattr(tokenizer, _VARIABLES, {})}


def unknown_variables(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """Return those of some variables whose names stand nowhere in the chat template."""
    return [name for name in names if name not in str(tokenizer.chat_template)]


def writes_date(tokenizer: Any) -> bool:
    """Return whether the chat template may write the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def written_date(tokenizer: Any) -> str:
    """Return what the chat template writes of its date, as far as that can be told; empty where it writes none."""
    if not writes_date(tokenizer):
        return ""
    date = getattr(tokenizer, _DATE, None) or datetime.now()
    calls = [one or other for one, other in _DATE_CALL.findall(_ASKED.sub("", str(tokenizer.chat_template)))]
    if "" in calls:  # what it asks for is not written in the call
        return str(date)
    return "\n".join(date.strftime(words) for words in calls)


def _dated(template: str, date: datetime) -> str:
    """Return the template with a `strftime_now` of its own, in place of transformers', which asks the clock.

    A template cannot be handed a function: transformers gives it plain data alone.
    """
    filled: dict[str, str] = {}
    for directive in (f"%{dash}{letter}" for dash in ("-", "") for letter in _DIRECTIVES):
        with suppress(ValueError):  # Windows refuses those with a dash, among others
            filled[directive] = date.strftime(directive)
    words = "".join(f"|replace({json.dumps(key)}, {json.dumps(word)})" for key, word in filled.items())
    # Jinja takes the new line away, so that the template itself still begins a line.
    return (
        f"{{%- macro strftime_now(format) -%}}{{{{ format{words}|replace('%%', '%') }}}}{{%- endmacro %}}\n{template}"
    )


def apply_template(tokenizer: Any, chats: Sequence[Table], **options: Any) -> Any:
    """Return what `tokenizer.apply_chat_template` returns for several conversations.

    Args:
        tokenizer: Has a chat template.
        chats: One or more conversations, each a list of turns with `role` and `content`.
        **options: Passed to `apply_chat_template`.

    Raises:
        TemplateError: The template refuses a conversation, or fails in some other way.
        ValueError, TypeError, IndexError: The same, as transformers raises it.
        BadInput: The template takes too long or too much memory, or its text is far too long.
        MemoryError: The process may have less memory than a template is allowed.
    """
    date, template = getattr(tokenizer, _DATE, None), tokenizer.chat_template
    options = getattr(tokenizer, _VARIABLES, {}) | options
    if date and isinstance(template, str) and writes_date(tokenizer):
        options["chat_template"] = _dated(template, date)
    given = sum(map(_characters, chats))
    seconds = _SECONDS + _SECONDS_PER_CHAT * len(chats) + _SECONDS_PER_CHARACTER * given
    more_bytes = _MORE_BYTES + _BYTES_PER_CHARACTER * given
    try:
        with _limits(seconds, more_bytes):
            made = tokenizer.apply_chat_template(list(chats), **options)
    except (TemplateError, ValueError, TypeError, IndexError, StudioError):
        raise
    except MemoryError as error:
        if _is_narrower(more_bytes):  # the computer's or the session's limit, not the template's
            raise
        raise BadInput(
            f"the model's chat template takes more than {more_bytes / 2**30:.0f} GiB of memory, {_ANOTHER}"
        ) from error
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    for chat, text in zip(chats, made if isinstance(made, list) else [], strict=False):
        _refuse_endless(chat, text)
    return made


def _refuse_endless(chat: Table, text: object) -> None:
    if not isinstance(text, str) or len(text) <= _LEAST_CHARACTERS:
        return
    asked = _characters(chat)
    if len(text) > _LEAST_CHARACTERS + _LONGER * asked:
        raise BadInput(
            f"the model's chat template makes {len(text):,} characters of a conversation of {asked:,}, {_ANOTHER}"
        )


def _characters(chat: Table) -> int:
    return sum(len(str(value)) for turn in chat for value in turn.values())


@contextmanager
def _limits(seconds: float, more_bytes: int) -> Iterator[None]:
    # Raised where stderr has no file descriptor, and where the system has no memory for one more thread.
    with suppress(ValueError, OSError, AttributeError, RuntimeError):
        faulthandler.dump_traceback_later(seconds * _LAST_RESORT, exit=True)
    try:
        with _memory(more_bytes), _time(seconds):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    """Raise after so many seconds. Only the main thread receives signals; others are left to faulthandler's timer."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    end = time.monotonic() + seconds

    def late(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= end:
            raise BadInput(f"the model's chat template has not ended after {seconds:.0f} s, {_ANOTHER}")

    before = signal.signal(signal.SIGALRM, late)
    # Again every second: the template may catch the first exception.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory(more_bytes: int) -> Iterator[None]:
    held = _address_space_bytes()
    if resource is None or held is None or _is_narrower(more_bytes):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _is_narrower(more_bytes: int) -> bool:
    """Return whether the process may not take so much more in any case."""
    held = _address_space_bytes()
    if resource is None or held is None:
        return False
    limits = resource.getrlimit(resource.RLIMIT_AS)
    return any(limit != resource.RLIM_INFINITY and limit <= held + more_bytes for limit in limits)


def _address_space_bytes() -> int | None:
    """Return the size of this process's address space, the first field of proc(5) statm; None without such a file."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
