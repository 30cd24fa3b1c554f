"""How a screen can look: the sizes of terminals, and the colours that a person or a terminal asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich._palettes import STANDARD_PALETTE
from rich.color import Color, ColorSystem
from rich.style import Style
from textual.filter import Monochrome
from textual.pilot import Pilot

from studio.tui.app import StudioApp
from studio.tui.themes import COLOUR_BLIND, SIXTEEN
from tests.pictures.drawn import Ground, Row, rows_of

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((120, 40), (80, 24), (200, 60))
"""Columns and rows: a usual window, the smallest one that is promised, and a large one."""


DARK = Ground()


@dataclass(frozen=True, slots=True)
class Look:
    """A theme, and what the terminal makes of its colours."""

    name: str
    theme: str
    ground: Ground = DARK
    sixteen: bool = False
    monochrome: bool = False


LOOKS = (
    Look("dark", "textual-dark"),
    Look("light", "textual-light", Ground("#1f1f1f", "#e0e0e0")),
    Look("colour-blind", COLOUR_BLIND.name),
    Look("sixteen", SIXTEEN.name, Ground("#aaaaaa", "#000000"), sixteen=True),
    Look("no-color", "textual-dark", monochrome=True),
)


async def wear(pilot: Pilot[None], app: StudioApp, look: Look) -> None:
    """Let the studio look so, as if it had been started so."""
    app._filters[:] = [each for each in app._filters if not isinstance(each, Monochrome)]
    if look.monochrome:
        app._filters.append(Monochrome())
    app.no_color = look.monochrome
    app.theme = look.theme
    for screen in app.screen_stack:
        screen._styles_cache.clear()
        for widget in screen.walk_children():
            widget._styles_cache.clear()
        screen.refresh(layout=True)
    await pilot.pause()


def cells_of(app: StudioApp, look: Look) -> list[Row]:
    """Return the screen as the terminal would show it."""
    update = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens)
    lines = update.strips  # type: ignore[union-attr]  a full update has all rows, each in strips from the left
    rows = rows_of([[segment for strip in line for segment in strip] for line in lines])
    return [[(text, in_sixteen(style)) for text, style in row] for row in rows] if look.sixteen else rows


def in_sixteen(style: Style) -> Style:
    """Return a style in the nearest of a terminal's sixteen colours, as Rich chooses it."""
    text, behind = (_nearest(colour) for colour in (style.color, style.bgcolor))
    return style + Style(color=text, bgcolor=behind)


def _nearest(colour: Color | None) -> Color | None:
    number = colour.downgrade(ColorSystem.STANDARD).number if colour else None
    return colour if number is None else Color.from_triplet(STANDARD_PALETTE[number])


def elsewhere(rows: Sequence[Row], home: Path) -> list[Row]:
    """Return a screen as it would be on the reader's machine: with their folders in place of those of this one."""
    found = []
    for row in rows:
        parts = []
        for text, style in row:
            told = text.replace(str(home), "~/lora-studio").replace(str(ROOT), "~/src/lora-studio")
            parts.append((told.ljust(len(text))[: len(text)] if told != text else text, style))
        found.append(parts)
    return found
