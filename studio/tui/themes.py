"""Our own themes beside Textual's: high contrast, dark and light, and one for eyes that do not tell red from green.

Words in colour stand under the cursor of lists too, so that each theme has a cursor on which they can be read.
"""

from dataclasses import replace

from textual.theme import BUILTIN_THEMES, Theme


def _cursor(background: str, foreground: str, blurred: str = "") -> dict[str, str]:
    """Return the variables of a cursor's line, and of it in a list that is not typed in."""
    away = {"block-cursor-blurred-background": blurred} if blurred else {}
    return {"block-cursor-background": background, "block-cursor-foreground": foreground, **away}


DARK = replace(BUILTIN_THEMES["textual-dark"], variables=_cursor("#123f63", "#ffffff"))
LIGHT = replace(
    BUILTIN_THEMES["textual-light"],
    variables={
        "text-accent": "#7d4a00",
        "text-warning": "#7d4a00",
        "text-success": "#1d5c31",
        **_cursor("#a9c6e2", "#000000", "#c3cfda"),
    },
)
"""Textual's two, whose blue cursor swallows words in green, and whose light one has green and orange too pale."""
HIGH_CONTRAST = Theme(
    name="high-contrast",
    primary="#5cd6ff",
    secondary="#ffffff",
    accent="#ffff00",
    success="#4dff4d",
    warning="#ffd700",
    error="#ff6e6e",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#1a1a1a",
    boost="#333333",
    dark=True,
    variables={"text-muted": "#e0e0e0", "foreground-muted": "#e0e0e0", **_cursor("#00395c", "#ffffff")},
)
HIGH_CONTRAST_LIGHT = Theme(
    name="high-contrast-light",
    primary="#003a9e",
    secondary="#000000",
    accent="#7a0055",
    success="#005a00",
    warning="#7a3e00",
    error="#a30000",
    foreground="#000000",
    background="#ffffff",
    surface="#ffffff",
    panel="#e4e4e4",
    boost="#d0d0d0",
    dark=False,
    variables={"text-muted": "#2b2b2b", "foreground-muted": "#2b2b2b", **_cursor("#bfd7f5", "#000000")},
)
COLOUR_BLIND = Theme(
    name="colour-blind-safe",
    primary="#56b4e9",
    secondary="#cc79a7",
    accent="#e69f00",
    success="#009e73",
    warning="#f0e442",
    error="#d55e00",
    foreground="#e6e6e6",
    background="#121212",
    surface="#1c1c1c",
    panel="#26292e",
    dark=True,
    variables=_cursor("#1c3f57", "#ffffff"),
)
"""The palette of Okabe and Ito (2008), which all common kinds of colour blindness keep apart."""

SIXTEEN = Theme(
    name="sixteen-colours",
    primary="#55ffff",
    secondary="#ff55ff",
    accent="#ffff55",
    success="#55ff55",
    warning="#ffff55",
    error="#ff5555",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#0000aa",
    dark=True,
    variables={
        "text-primary": "#55ffff",
        "text-secondary": "#ff55ff",
        "text-accent": "#ffff55",
        "text-success": "#55ff55",
        "text-warning": "#ffff55",
        "text-error": "#ff5555",
        "text-muted": "#aaaaaa",
        **_cursor("#0000aa", "#ffffff", "#0000aa"),
    },
)
"""Uses only the colours that a terminal of sixteen colours has. It would show the tints of other themes as the nearest
of those, which is mostly grey."""

OURS = (DARK, LIGHT, HIGH_CONTRAST, HIGH_CONTRAST_LIGHT, COLOUR_BLIND, SIXTEEN)
