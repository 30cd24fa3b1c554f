"""What a screen hands to the terminal's clipboard, and what is said of it.

The terminal is asked by OSC 52. It answers nothing, so that whether it heard cannot be known.
"""

import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from studio.core.text import plain
from studio.runs.layout import RunPaths

_BETWEEN = {
    "TMUX": " tmux passes it on where its option set-clipboard is on.",
    "STY": " GNU screen does not pass it on.",
}
"""What may stand between us and the clipboard."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a screen hands to the clipboard: a path or a text, and what to call it."""

    name: str
    text: str


@runtime_checkable
class Copies(Protocol):
    """A screen of which something can be copied besides the text that the mouse has marked."""

    def to_copy(self) -> Copied | None:
        """Return what is worth copying now; None for nothing."""


def folder_of(paths: RunPaths) -> Copied:
    """Return what is copied of a run: the folder of its adapter, where it has one, else its own."""
    adapter = paths.adapter.is_dir()
    place = plain(str(paths.adapter if adapter else paths.root), one_line=True)
    return Copied(f"the path of the {'adapter' if adapter else 'run'}", place)


def sent_words(text: str, name: str) -> str:
    """Return what is said of a text that was sent to the clipboard.

    Args:
        text: What was sent.
        name: What it is called; empty for the number of its characters.
    """
    what = name or f"{len(text)} character{'s' * (len(text) != 1)}"
    between = "".join(words for variable, words in _BETWEEN.items() if os.environ.get(variable))
    return f"Sent to the terminal's clipboard: {what}.{between}"
