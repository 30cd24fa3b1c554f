"""Foreign text made harmless: from data, models, logs and file names to something a terminal may show."""

import unicodedata

_KEPT = {"\n", "\t"}
# Bidirectional overrides and isolates reorder what a person reads ("Trojan Source", CVE-2021-42574).
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def plain(text: str, *, one_line: bool = False, limit: int | None = None) -> str:
    r"""Return the text with every control, format-override and surrogate character made visible.

    C0 and C1 controls (ESC, BEL, 8-bit CSI ...) become `\xNN`; bidirectional overrides and lone surrogates `\uNNNN`.
    New lines and tabs stay unless `one_line`.

    Args:
        text: Anything, from anywhere.
        one_line: Show new lines and tabs as visible escapes too.
        limit: Longest result in characters; what is cut is marked with an ellipsis.
    """
    if limit is not None and len(text) > limit:
        text = text[: max(0, limit - 1)] + "…"
    if text.isprintable():
        return text
    return "".join(_visible(character, one_line) for character in text)


def every_character(text: str) -> str:
    r"""Return a text of data so that each of its characters is seen: those without a width or a shape as escapes.

    As `plain` in one line, but marks that join, hide or reorder letters (U+200B, U+FEFF, U+00AD ...) and odd spaces are
    escapes too, `\uNNNN`. A new line is `⏎`, so that `\n` in a text is what the text holds.
    """
    if text.isprintable():  # of the spaces only the usual one is
        return text
    return "".join("⏎" if character == "\n" else _told(character) for character in text)


def _told(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if code < 0x100 and unicodedata.category(character) == "Cc":
        return repr(character)[1:-1]
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def plain_path(path: str, cells: int) -> str:
    """Return a path made harmless, in one line of at most `cells` cells of a terminal, with its end in sight.

    A long path is cut on the left, at a separator where possible, since the name at its end tells paths apart. A name
    that is too long itself is cut in its middle.
    """
    shown = plain(path, one_line=True)
    if _cells(shown) <= cells:
        return shown
    place = shown.find("/", 1)
    while place >= 0:
        if _cells(tail := shown[place:]) < cells and len(tail) > 1:
            return f"…{tail}"
        place = shown.find("/", place + 1)
    name = shown.rstrip("/").rpartition("/")[2]
    end = name
    while name and _cells(name) > (cells - 1) // 2:
        name = name[:-1]
    while end and _cells(name) + _cells(end) >= cells:
        end = end[1:]
    return f"{name}…{end}"


def duration_text(seconds: float) -> str:
    """Return a finite number of seconds as `42 s`, `3 min 05 s`, `2 h 07 min` or `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _visible(character: str, one_line: bool) -> str:
    if character in _KEPT:
        return repr(character)[1:-1] if one_line else character
    code = ord(character)
    if code in _REORDERING or unicodedata.category(character) in ("Cs", "Zl", "Zp"):
        return f"\\u{code:04x}"
    if unicodedata.category(character) == "Cc":
        return f"\\x{code:02x}"
    return character
