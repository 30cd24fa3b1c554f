"""Rows of a terminal's screen as an SVG picture, still or moving.

Lines, blocks and braille are drawn as shapes, so that they join as they do in a terminal; other text is in the reader's
own font, set to the grid. The picture needs nothing else: no font, no script, no other file.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

WIDE, HIGH, SIZE, MARGIN = 8.4, 18.0, 14, 10.0
"""A cell's width and height, the font's size and the room around the screen, in the picture's own units."""
_FONTS = "ui-monospace,'Cascadia Mono',Menlo,'DejaVu Sans Mono','Liberation Mono',Consolas,monospace"
_THIN, _THICK = 1.2, 2.6

Row = list[tuple[str, Style]]
"""The cells of one row, from the left: texts, each with its style."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What a terminal paints where a program asks for no colour of its own."""

    text: str = "#e0e0e0"
    back: str = "#121212"


@dataclass(frozen=True, slots=True)
class Frame:
    """A screen that is shown for some time, with what the title says of it meanwhile."""

    rows: Sequence[Row]
    seconds: float
    title: str


def rows_of(lines: Sequence[Sequence[Segment]]) -> list[Row]:
    """Return rows of Textual's or Rich's segments, without what only steers the terminal."""
    return [[(part.text, part.style or Style()) for part in line if not part.control and part.text] for line in lines]


def still(rows: Sequence[Row], columns: int, ground: Ground, title: str) -> str:
    """Return a picture of a screen; `title` is read out where it cannot be seen."""
    drawn = "".join(_row_of(row, at, ground) for at, row in enumerate(rows))
    return _picture(drawn, columns, len(rows), ground, title, top=0.0)


def moving(frames: Sequence[Frame], columns: int, ground: Ground, title: str) -> str:
    """Return a picture that shows one frame after another, and then begins again; each frame's title stands above it.

    Each row is stored once for the frames in which it stays as it is.
    """
    height = max(len(frame.rows) for frame in frames)
    drawn = []
    for at in range(-1, height):
        looks = [_title_of(frame, ground) if at < 0 else _row_at(frame, at, ground) for frame in frames]
        drawn += [_shown_in(look, [each == look for each in looks], frames) for look in dict.fromkeys(looks) if look]
    return _picture("".join(drawn), columns, height, ground, title, top=HIGH + 4)


def hexadecimal(style: Style, ground: Ground) -> tuple[str, str]:
    """Return the colours of a style's text and of what is behind it, reversed where it says so."""
    fore = style.color.get_truecolor().hex if style.color and not style.color.is_default else ground.text
    back = style.bgcolor.get_truecolor().hex if style.bgcolor and not style.bgcolor.is_default else ground.back
    return (back, fore) if style.reverse else (fore, back)


def _row_at(frame: Frame, at: int, ground: Ground) -> str:
    return _row_of(frame.rows[at], at, ground) if at < len(frame.rows) else ""


def _title_of(frame: Frame, ground: Ground) -> str:
    return f'<text x="0" y="-9" fill="{ground.text}" font-size="12">{escape(frame.title)}</text>'


def _shown_in(drawn: str, shown: Sequence[bool], frames: Sequence[Frame]) -> str:
    """Return a part of a moving picture that is shown in some of its frames."""
    if all(shown):
        return drawn
    seconds, began = sum(frame.seconds for frame in frames), 0.0
    times: list[tuple[float, bool]] = []
    for frame, is_shown in zip(frames, shown, strict=True):
        if not times or times[-1][1] != is_shown:
            times.append((began / seconds, is_shown))
        began += frame.seconds
    words = {True: "visible", False: "hidden"}
    return (
        f'<g visibility="{words[shown[0]]}"><animate attributeName="visibility" calcMode="discrete" '
        f'dur="{seconds:.2f}s" repeatCount="indefinite" values="{";".join(words[is_shown] for _, is_shown in times)}" '
        f'keyTimes="{";".join(f"{time:.5g}" for time, _ in times)}"/>{drawn}</g>'
    )


def _picture(drawn: str, columns: int, rows: int, ground: Ground, title: str, top: float) -> str:
    width, height = columns * WIDE + 2 * MARGIN, rows * HIGH + 2 * MARGIN + top
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}"><title>{escape(title)}</title><style>text{{font-family:{_FONTS};white-space:pre}}'
        ".b{font-weight:bold}.i{font-style:italic}.u{text-decoration:underline}.s{text-decoration:line-through}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{ground.back}" stroke="#808080" stroke-opacity=".5"/>'
        f'<g transform="translate({MARGIN:g} {MARGIN + top:g})" font-size="{SIZE}">{drawn}</g></svg>\n'
    )


def _row_of(row: Row, at: int, ground: Ground) -> str:
    """Return one row: what is behind it, then its shapes, then its texts."""
    top, x = at * HIGH, 0.0
    behind: dict[str, list[str]] = defaultdict(list)
    shapes: dict[tuple[str, float], list[str]] = defaultdict(list)
    texts: list[str] = []
    for text, style in _joined(row):
        fore, back = hexadecimal(style, ground)
        if back != ground.back:
            # a little wider, because the rounding of two neighbours would leave a line between them
            behind[back].append(f"M{x:g} {top:g}h{cell_len(text) * WIDE + 0.3:g}v{HIGH + 0.3:g}H{x:g}z")
        for piece, drawn in _pieces(text):
            for character in piece if drawn else ():
                for path, opacity in shape_of(character):
                    shapes[fore, opacity].append(path(x, top))
                x += WIDE
            if not drawn:
                if bare := piece.strip(" "):
                    start = x + (len(piece) - len(piece.lstrip(" "))) * WIDE
                    texts.append(_text_of(bare, start, top, fore, style))
                x += cell_len(piece) * WIDE
    paths = [f'<path fill="{colour}" d="{"".join(parts)}"/>' for colour, parts in behind.items()]
    for (colour, opacity), parts in shapes.items():
        fill = f' fill-opacity="{opacity:g}"' if opacity < 1 else ""
        paths.append(f'<path fill="{colour}"{fill} d="{"".join(parts)}"/>')
    return "".join([*paths, *texts])


def _joined(row: Row) -> Row:
    """Return a row with neighbours of the same style as one."""
    return [("".join(text for text, _ in parts), style) for style, parts in groupby(row, key=lambda each: each[1])]


def _pieces(text: str) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with whether its characters are drawn as shapes; wide gaps cut it, too."""
    pieces = re.split(f"([{_DRAWN}]+|  +)", text)
    return [(piece, piece[0] in _SHAPES) for piece in pieces if piece]


def _text_of(text: str, x: float, top: float, colour: str, style: Style) -> str:
    marks = {"b": style.bold, "i": style.italic, "u": style.underline, "s": style.strike}
    said = " ".join(mark for mark, is_on in marks.items() if is_on)
    more = (f' class="{said}"' if said else "") + (' opacity=".6"' if style.dim else "")
    length = cell_len(text) * WIDE
    fit = f' textLength="{length:g}" lengthAdjust="spacingAndGlyphs"' if len(text) > 1 else ""
    return f'<text x="{x:g}" y="{top + HIGH * 0.75:g}" fill="{colour}"{more}{fit}>{escape(text)}</text>'


Path = Callable[[float, float], str]
Shape = list[tuple[Path, float]]
"""Ways to draw a character whose cell begins at a place, each with how much it covers what is behind it."""


def shape_of(character: str) -> Shape:
    """Return how a line, a block or a braille character is drawn; nothing for other characters."""
    return _SHAPES.get(character, [])


def _box(left: float, top: float, width: float, height: float) -> Path:
    """Return what draws a part of a cell, given in shares of it."""

    def path(x: float, y: float) -> str:
        return f"M{x + left * WIDE:g} {y + top * HIGH:g}h{width * WIDE:g}v{height * HIGH:g}h{-width * WIDE:g}z"

    return path


def _blocks() -> dict[str, Shape]:
    found = {chr(0x2580 + eighths): _box(0, 1 - eighths / 8, 1, eighths / 8) for eighths in range(1, 9)}
    found |= {chr(0x2590 - eighths): _box(0, 0, eighths / 8, 1) for eighths in range(1, 8)}
    found |= {
        "▀": _box(0, 0, 1, 0.5),
        "▐": _box(0.5, 0, 0.5, 1),
        "▔": _box(0, 0, 1, 1 / 8),
        "▕": _box(7 / 8, 0, 1 / 8, 1),
    }
    shapes = {character: [(path, 1.0)] for character, path in found.items()}
    shapes |= {chr(0x2591 + step): [(_box(0, 0, 1, 1), 0.25 * (step + 1))] for step in range(3)}
    corners = [_box(0, 0, 0.5, 0.5), _box(0.5, 0, 0.5, 0.5), _box(0, 0.5, 0.5, 0.5), _box(0.5, 0.5, 0.5, 0.5)]
    for character, which in zip("▘▝▀▖▌▞▛▗▚▐▜▄▙▟", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14), strict=True):
        shapes.setdefault(character, [(corner, 1.0) for bit, corner in enumerate(corners) if which >> bit & 1])
    return shapes


_DOTS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
"""Column and row of each dot of braille, in the order of its bits."""


def _braille() -> dict[str, Shape]:
    dots = [(_box(0.14 + 0.5 * column, 0.06 + 0.25 * row, 0.24, 0.12), 1.0) for column, row in _DOTS]
    return {chr(0x2800 + bits): [dot for bit, dot in enumerate(dots) if bits >> bit & 1] for bits in range(256)}


def _arm(direction: str, weight: float) -> Path:
    """Return a line from a cell's middle to one of its sides."""

    def path(x: float, y: float) -> str:
        middle_x, middle_y, half = x + WIDE / 2, y + HIGH / 2, weight / 2
        if direction in ("LEFT", "RIGHT"):
            start = x if direction == "LEFT" else middle_x - half
            return f"M{start:g} {middle_y - half:g}h{WIDE / 2 + half:g}v{weight:g}h{-WIDE / 2 - half:g}z"
        start = y if direction == "UP" else middle_y - half
        return f"M{middle_x - half:g} {start:g}h{weight:g}v{HIGH / 2 + half:g}h{-weight:g}z"

    return path


def _round(first: str, second: str) -> Path:
    """Return a rounded corner that joins an upper or lower side with a left or right one."""

    def path(x: float, y: float) -> str:
        down, right, half = "DOWN" in (first, second), "RIGHT" in (first, second), _THIN / 2
        middle_x, middle_y = x + WIDE / 2, y + HIGH / 2
        side_x, side_y = (x + WIDE if right else x), (y + HIGH if down else y)
        into, across = (1 if down else -1), (1 if right else -1)
        outer = f"M{middle_x - across * half:g} {side_y:g}Q{middle_x - across * half:g} {middle_y - into * half:g} "
        inner = f"{side_x:g} {middle_y - into * half:g}V{middle_y + into * half:g}"
        back = f"Q{middle_x + across * half:g} {middle_y + into * half:g} {middle_x + across * half:g} {side_y:g}z"
        return outer + inner + back

    return path


_SIDES = {"HORIZONTAL": ("LEFT", "RIGHT"), "VERTICAL": ("UP", "DOWN")}


def _lines() -> dict[str, Shape]:
    """Return the lines whose Unicode name says where their arms go: light, heavy, and rounded ones."""
    shapes: dict[str, Shape] = {}
    for character in map(chr, range(0x2500, 0x2580)):
        name = re.match(
            r"BOX DRAWINGS (LIGHT ARC|LIGHT|HEAVY) ([A-Z]+)(?: AND ([A-Z]+))?$", unicodedata.name(character)
        )
        if name is None:
            continue
        kind, *named = (word for word in name.groups() if word)
        if kind == "LIGHT ARC":
            shapes[character] = [(_round(named[0], named[1]), 1.0)]
            continue
        arms = [arm for word in named for arm in _SIDES.get(word, (word,))]
        if all(arm in ("LEFT", "RIGHT", "UP", "DOWN") for arm in arms):
            weight = _THICK if kind == "HEAVY" else _THIN
            shapes[character] = [(_arm(arm, weight), 1.0) for arm in arms]
    return shapes


_SHAPES = _blocks() | _braille() | _lines()
_DRAWN = "".join(map(re.escape, _SHAPES))
