"""A model's chat template, run within limits: it is a program of strangers, and may loop for ever or grow without end.

Time is kept by a timer signal, which Python heeds between two of its instructions; where one instruction takes for ever
(a power of huge numbers), a timer without Python ends the process and leaves the calls in `output.log`
(`studio.runs.last_words` reads them). Memory is kept by the address space that the system grants meanwhile.
"""

import faulthandler
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
"""A conversation of thousands of words takes about a millisecond, and its tokens, which some calls make too, ten."""
_LAST_RESORT = 3.0
"""The timer without Python waits so many times as long."""
_MORE_BYTES = 2 * 2**30
_BYTES_PER_CHARACTER = 500
"""Tokens with their places in the text, as Python lists: 4 characters a token, a dozen numbers each."""
_LEAST_CHARACTERS = 2**20
_LONGER = 64
"""How much longer than its messages a text may be: templates add some dozen characters a turn, and a prompt."""
_ANOTHER = "so it cannot be used. Use the tokenizer of another copy of this model."

Table = Sequence[dict[str, str]]


def apply_template(tokenizer: Any, chats: Sequence[Table], **options: Any) -> Any:
    """Return what `tokenizer.apply_chat_template` makes of several conversations, at least one.

    Raises:
        TemplateError: The template refuses one, or fails in a way of its own.
        ValueError: As above, and so are TypeError and IndexError, which transformers raises.
        BadInput: It takes too long, or too much memory, or writes without end.
    """
    given = sum(map(_characters, chats))
    seconds = _SECONDS + _SECONDS_PER_CHAT * len(chats) + _SECONDS_PER_CHARACTER * given
    more_bytes = _MORE_BYTES + _BYTES_PER_CHARACTER * given
    try:
        with _limits(seconds, more_bytes):
            made = tokenizer.apply_chat_template(list(chats), **options)
    except (TemplateError, ValueError, TypeError, IndexError, StudioError):
        raise
    except MemoryError as error:
        raise BadInput(
            f"the model's chat template takes more than {more_bytes / 2**30:.0f} GiB of memory, {_ANOTHER}"
        ) from error
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    for chat, text in zip(chats, made if isinstance(made, list) else [], strict=False):
        _refuse_endless(chat, text)
    return made


def _refuse_endless(chat: Table, text: object) -> None:
    asked = _characters(chat)
    if isinstance(text, str) and len(text) > _LEAST_CHARACTERS + _LONGER * asked:
        raise BadInput(
            f"the model's chat template makes {len(text):,} characters of a conversation of {asked:,}, {_ANOTHER}"
        )


def _characters(chat: Table) -> int:
    return sum(len(str(value)) for turn in chat for value in turn.values())


@contextmanager
def _limits(seconds: float, more_bytes: int) -> Iterator[None]:
    with suppress(ValueError, OSError, AttributeError):  # a stderr without a file
        faulthandler.dump_traceback_later(seconds * _LAST_RESORT, exit=True)
    try:
        with _memory(more_bytes), _time(seconds):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    """Only the main thread receives signals; another one is left to the timer without Python."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    end = time.monotonic() + seconds

    def late(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= end:
            raise BadInput(f"the model's chat template has not ended after {seconds:.0f} s, {_ANOTHER}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory(more_bytes: int) -> Iterator[None]:
    held = _address_space_bytes()
    if resource is None or held is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = held + more_bytes
    if any(limit != resource.RLIM_INFINITY and limit <= most for limit in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int | None:
    """Return the first field of proc(5) statm; None where there is no such file."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
