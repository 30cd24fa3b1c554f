"""What a machine can see wrong with a picture: text that is hard to read on its ground, and room that is left empty.

The rest is for eyes. A finding is a place to look at, not a verdict: a list of three runs may be right to be empty.
"""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.style import Style

from tests.pictures.drawn import Ground, Row, hexadecimal, shape_of

READABLE = 3.0
"""The least contrast of text that WCAG 2.2 (1.4.11, and 1.4.3 for large text) accepts; running text should have 4.5."""
EMPTY = 1 / 3
"""The share of the screen that may lie empty in one piece."""


def findings(rows: Sequence[Row], columns: int, ground: Ground) -> list[str]:
    """Return what is to be looked at in a picture, in words."""
    found = []
    faint = sorted(_faint(rows, ground))
    if faint:
        contrast, words = faint[0]
        found.append(f"{len(faint)} texts are faint; {words!r} has a contrast of {contrast:.1f}")
    if (share := empty_share(rows, columns)) > EMPTY:
        found.append(f"{share:.0%} of it lie empty in one piece")
    return found


def contrast(style: Style, ground: Ground) -> float:
    """Return how much a style's text stands out from what is behind it: 1 (not at all) to 21, by WCAG 2.2."""
    dark, light = sorted(_luminance(colour) for colour in hexadecimal(style, ground))
    return (light + 0.05) / (dark + 0.05)


def empty_share(rows: Sequence[Row], columns: int) -> float:
    """Return the share of the screen that its largest empty rectangle takes."""
    heights, largest = [0] * columns, 0
    for row in rows:
        cells = "".join(text if len(text) == cell_len(text) else "x" * cell_len(text) for text, _ in row).ljust(columns)
        heights = [height + 1 if cell == " " else 0 for height, cell in zip(heights, cells, strict=False)]
        largest = max(largest, _largest_under(heights))
    return largest / (columns * len(rows))


def _faint(rows: Sequence[Row], ground: Ground) -> Iterator[tuple[float, str]]:
    for text, style in (part for row in rows for part in row):
        words = "".join(character for character in text if not shape_of(character)).strip()
        if words and words.isprintable() and any(map(str.isalnum, words)) and contrast(style, ground) < READABLE:
            yield contrast(style, ground), words[:40]


def _largest_under(heights: Sequence[int]) -> int:
    """Return the area of the largest rectangle below a line of columns with these heights."""
    largest, open_since = 0, list[tuple[int, int]]()
    for place, height in enumerate([*heights, 0]):
        start = place
        while open_since and open_since[-1][1] >= height:
            start, tall = open_since.pop()
            largest = max(largest, tall * (place - start))
        open_since.append((start, height))
    return largest


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
