"""What a screen is for and what its keys do, in a box and in the palette: made from its bindings and its actions.

On the configure screen the help explains every field, too.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from textual.actions import parse
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.dom import DOMNode
from textual.screen import Screen
from textual.widgets import Static

from studio.core.recipe import FIELDS, SECTIONS
from studio.core.value_kinds import Number
from studio.tui.screens.dialogs import Dialog
from studio.tui.screens.offers import OfferingScreen

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
    "f1": "F1",
}

_WORDS = {"Focus Next": "Next field or part of the screen", "Focus Previous": "The one before"}
"""Our words in place of Textual's own descriptions."""

_FOCUS = ("app.focus_next", "app.focus_previous")
"""Do nothing where a screen has one part that takes keys."""

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


_RECIPE = "The recipe: what is trained, on what and how, with the memory that it takes. Every change can be undone."


class HelpScreen(Dialog[None]):
    """Scrolls; any of its keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark,f1,q", "leave", "Back")]

    DEFAULT_CSS = """
    HelpScreen > VerticalScroll { width: 84; height: 90%; padding: 0 1; }
    """

    def __init__(self, keys: Iterable[tuple[str, str]], *, fields: bool, about: str = "") -> None:
        """Show keys with what they do.

        Args:
            keys: Key and description.
            fields: Whether to explain every field of a recipe, too.
            about: What the screen is for.
        """
        super().__init__()
        self._text = help_text(tuple(keys), fields=fields, about=about)

    def compose(self) -> ComposeResult:
        """Make the box with the text."""
        with VerticalScroll() as box:
            box.border_title = "Help"
            box.border_subtitle = "esc closes"
            yield Static(self._text, markup=False)


def keys_of(screen: Screen[Any]) -> list[tuple[str, str]]:
    """Return the keys that do something now, each with what it does.

    Of a focused widget only the keys that the footer shows are listed: its hidden ones scroll or move a cursor. Hidden
    keys with ctrl or super are second keys for the same, or Textual's own.
    """
    keys: dict[tuple[str, str], list[str]] = {}
    for active in screen.active_bindings.values():
        binding = active.binding
        told = binding.show or (active.node in (screen, screen.app) and not binding.key.startswith(("ctrl+", "super+")))
        told = told and not (binding.action in _FOCUS and len(screen.focus_chain) < 2)
        if active.enabled and binding.description and told:
            name = binding.action.removeprefix("app.")
            keys.setdefault((name, binding.description), []).append(_shown(binding.key))
    return [(" ".join(dict.fromkeys(found)), description) for (_, description), found in keys.items()]


def commands_of(screen: Screen[Any]) -> Iterator[SystemCommand]:
    """Yield every action of a screen and of what has its focus, for the palette; what cannot be done now says why."""
    app, focused = screen.app, screen.focused
    seen: set[str] = set()
    for node in focused.ancestors_with_self if focused else (screen,):
        if node is app:
            break
        for key, bindings in node._bindings.key_to_bindings.items():
            for binding in bindings:
                hidden = not binding.show and (node is not screen or key.startswith(("ctrl+", "super+")))
                if hidden or not binding.description or binding.action in seen or binding.action.startswith("app."):
                    continue
                seen.add(binding.action)
                why = node.why_not(binding.action) if isinstance(node, OfferingScreen) else ""
                if why:
                    yield SystemCommand(binding.description, why, partial(app.notify, why, markup=False))
                elif app._check_action_state(binding.action, node):
                    told = f"{_shown(key)}   {_told(node, binding.action)}"
                    yield SystemCommand(binding.description, told, _done(node, binding.action))


def _done(node: DOMNode, action: str) -> Callable[[], Any]:
    return lambda: node.app.run_action(action, default_namespace=node)


def _told(node: DOMNode, action: str) -> str:
    """Return what an action does: the first line of its description in the code, which each has."""
    method = getattr(node, f"action_{parse(action)[1]}", None)
    return (getattr(method, "__doc__", None) or "").partition("\n")[0].replace("`", "")


def help_text(keys: tuple[tuple[str, str], ...], *, fields: bool, about: str = "") -> Content:
    """Return the keys and, where asked for, the fields by section."""
    about = about or (_RECIPE if fields else "")
    parts: list[str | tuple[str, str]] = [f"{about}\n\n"] if about else []
    parts.append(("Keys\n", "bold"))
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
