"""The last filter of every row before it is written: takes out what steers a terminal, or what it cannot draw.

It is a safety net: the widgets make foreign text harmless themselves.
"""

import unicodedata
from collections.abc import Callable
from functools import lru_cache

from rich.cells import cell_len
from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_BRAILLE = range(0x2800, 0x2900)
# Dots of a braille cell by the row that they stand in, from the top (Unicode numbers them 1-8).
_BRAILLE_ROWS = (0x09, 0x12, 0x24, 0xC0)
_BRAILLE_LOOKS = " .-:-::|'|:|':||"
"""Indexed by the rows that hold dots: the sum of 1 for the lowest row, 2, 4, and 8 for the top row."""

_ASCII = dict(zip("█▓▒░▚≡◦·•●○◂▸▲▼◆┃…←→↑↓⏎⇧⌫", "#%+:x=o.*OO<>^v*|.<><>~^<", strict=False)) | {"↑": "^", "↓": "v"}
_ASCII |= dict(zip("■✓✗◌‖“”", '#+xo=""', strict=True))


class SafeOutput(LineFilter):
    """Drops control characters and reordering marks, and replaces what the terminal cannot draw.

    Widths stay as they are: a character without width is dropped, one of two cells becomes two characters.
    """

    def __init__(self, can_draw: Callable[[str], bool] | None = None) -> None:
        """Filter for one terminal.

        Args:
            can_draw: Returns whether the terminal can draw a character; None where it draws all of them.
        """
        super().__init__()
        self._can_draw = can_draw

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Return the row as it may be written; the same list where nothing needs to change."""
        if self._can_draw is None and all(segment.text.isprintable() for segment in segments):
            return segments
        return [Segment(self._safe(text), style, control) for text, style, control in segments]

    def _safe(self, text: str) -> str:
        if text.isascii() and text.isprintable():
            return text
        return "".join(map(self._drawn, text))

    def _drawn(self, character: str) -> str:
        if unicodedata.category(character) in ("Cc", "Cs") or ord(character) in _REORDERING:
            return ""
        if self._can_draw is None or self._can_draw(character):
            return character
        return ascii_of(character)


@lru_cache(maxsize=4096)
def ascii_of(character: str) -> str:
    """Return ASCII text that is as wide as a character and looks like it, as far as ASCII can."""
    code = ord(character)
    if code < 128:
        return character
    if code in _BRAILLE:
        dots = code - _BRAILLE.start
        rows = [bool(dots & mask) for mask in _BRAILLE_ROWS]
        return _BRAILLE_LOOKS[sum(8 >> place for place, held in enumerate(rows) if held)]
    if character in _ASCII:
        return _ASCII[character]
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        return _of_line(name)
    if name.endswith("BLOCK") or "EIGHTH" in name:
        return "_" if name.startswith("LOWER") else "-" if name.startswith("UPPER") else "|"
    letters = "".join(
        part for part in unicodedata.normalize("NFKD", character) if part.isascii() and part.isprintable()
    )
    width = cell_len(character)
    return letters[:width].ljust(width, "?" if not letters else " ")


def drawable(encoding: str | None, *, braille: bool = True) -> Callable[[str], bool] | None:
    """Return a function that says whether a terminal can draw a character; None where it can draw all of them.

    Args:
        encoding: The encoding of the stream that is drawn on.
        braille: Whether the terminal's font has braille; that of the Linux console has not.
    """
    name = (encoding or "ascii").lower().replace("_", "-")
    if name in ("utf-8", "utf8"):
        return None if braille else lambda character: ord(character) not in _BRAILLE

    @lru_cache(maxsize=4096)
    def can_draw(character: str) -> bool:
        try:
            character.encode(name)
        except (UnicodeError, LookupError):
            return False
        return True

    return can_draw


def _of_line(name: str) -> str:
    words = set(name.replace("-", " ").split())
    if words & {"HORIZONTAL", "LEFT", "RIGHT"} and not words & {"VERTICAL", "UP", "DOWN"}:
        return "-"
    if words & {"VERTICAL", "UP", "DOWN"} and not words & {"HORIZONTAL", "LEFT", "RIGHT", "ARC"}:
        return "|"
    return "+"
