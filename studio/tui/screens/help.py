"""Keys of a screen and, on the configure screen, every field: made from the bindings and the fields themselves."""

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from studio.core.recipe import FIELDS, SECTIONS
from studio.core.value_kinds import Number
from studio.tui.screens.dialogs import Dialog

_KEY_WIDTH = 14
_NAMES = {
    "left": "←",
    "right": "→",
    "up": "↑",
    "down": "↓",
    "question_mark": "?",
    "slash": "/",
    "escape": "esc",
    "shift+tab": "⇧tab",
}

_WORDS = {"Focus Next": "Next field or part of the screen", "Focus Previous": "The one before"}
"""Our words in place of Textual's own descriptions."""

_SLIDER_KEYS = (
    ("← →", "one stop less, more, at once"),
    ("PgDn PgUp", "several stops"),
    ("home end", "first, last stop"),
    ("enter", "edit: type a value, or turn it with arrows and wheel"),
    ("0-9", "begin to type a value"),
    ("enter", "accept the edit"),
    ("esc", "cancel the edit, and put the value of before back"),
    ("mouse", "drag or click on the track"),
    ("↑ ↓", "field before, next field"),
)
_CHOICE_KEYS = (
    ("← → space", "option before, next option, at once"),
    ("home end", "first, last option"),
    ("enter", "edit: the arrows choose"),
    ("enter", "accept the edit; so does leaving the choice"),
    ("esc", "cancel the edit, and put the option of before back"),
    ("mouse", "click on an option"),
)
_LINE_KEYS = (
    ("enter F2", "edit; a click does, too"),
    ("enter", "accept what was typed; so does leaving the line"),
    ("esc", "cancel, and leave the text as it was"),
)


class HelpScreen(Dialog[None]):
    """Scrolls; any of its keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark,q", "leave", "Back")]

    DEFAULT_CSS = """
    HelpScreen > VerticalScroll { width: 84; height: 90%; padding: 0 1; }
    """

    def __init__(self, keys: Iterable[tuple[str, str]], *, fields: bool) -> None:
        """Show keys with what they do.

        Args:
            keys: Key and description.
            fields: Whether to explain every field of a recipe, too.
        """
        super().__init__()
        self._text = help_text(tuple(keys), fields=fields)

    def compose(self) -> ComposeResult:
        """Make the box with the text."""
        with VerticalScroll() as box:
            box.border_title = "Help"
            box.border_subtitle = "esc closes"
            yield Static(self._text, markup=False)


def help_text(keys: tuple[tuple[str, str], ...], *, fields: bool) -> Content:
    """Return the keys and, where asked for, the fields by section."""
    parts: list[str | tuple[str, str]] = [("Keys\n", "bold")]
    parts += [f"  {_shown(key):{_KEY_WIDTH}}{_WORDS.get(words, words)}\n" for key, words in keys]
    if fields:
        parts.append(("\nOn a slider\n", "bold"))
        parts += [f"  {key:{_KEY_WIDTH}}{words}\n" for key, words in _SLIDER_KEYS]
        parts.append(("\nOn a choice\n", "bold"))
        parts += [f"  {key:{_KEY_WIDTH}}{words}\n" for key, words in _CHOICE_KEYS]
        parts.append(("\nIn a line of text\n", "bold"))
        parts += [f"  {key:{_KEY_WIDTH}}{words}\n" for key, words in _LINE_KEYS]
        for heading, paths in SECTIONS:
            parts.append((f"\n{heading}\n", "bold"))
            for path in paths:
                parts += _field(path)
    return Content.assemble(*parts)


def _field(path: str) -> list[str | tuple[str, str]]:
    field = FIELDS[path]
    limits = f", {field.kind.allowed}" if isinstance(field.kind, Number) else ""
    cost = f" {field.cost}" if field.cost else ""
    return [(f"  {field.label}", "underline"), (f"  {path}{limits}\n", "dim"), f"    {field.help}{cost}\n"]


def _shown(key: str) -> str:
    return _NAMES.get(key, key)
