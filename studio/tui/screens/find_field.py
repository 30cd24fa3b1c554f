"""Finds a field of the recipe by its name, its path, or a word of what is said about it."""

from collections.abc import Iterator

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, OptionList, Static

from studio.core.recipe import FIELDS, Recipe, choices_of
from studio.core.text import plain
from studio.tui.panels.recipe_form import ADVANCED, ESSENTIALS, SHOWN, shown_value, why_hidden
from studio.tui.screens.dialogs import Offers, Picker

_LABEL, _VALUE = 19, 22


class FindScreen(Picker[str]):
    """Closes with the path of the field to go to, or with None after escape."""

    DEFAULT_CSS = """
    FindScreen {
        & > Vertical { width: 78; height: 90%; }
        & #about { height: 4; border-top: solid $foreground 30%; color: $text-muted; }
    }
    """

    def __init__(self, recipe: Recipe) -> None:
        """Offer every field with its value in a recipe."""
        super().__init__()
        self._recipe = recipe

    def compose(self) -> ComposeResult:
        """Make the parts: filter, list, what is said of the field under the cursor."""
        with Vertical() as box:
            box.border_title = "Find a field"
            box.border_subtitle = "⏎ go to it  esc back"
            yield Input(placeholder="a name, or what it does: seed, memory, stop", compact=True, id="filter")
            yield Offers()
            yield Static("", id="about", markup=False)

    def on_mount(self) -> None:
        """Show all."""
        self.show_offers()
        self.query_one(Input).focus()

    def offers(self, text: str) -> Iterator[tuple[str | None, Content]]:
        """Yield the fields that are found; one that means nothing to this recipe cannot be chosen and says why."""
        for path in found(text):
            why = why_hidden(path, self._recipe)
            written = shown_value(path, self._recipe.get(path))
            value = plain(why or SHOWN.get(written, written), one_line=True, limit=_VALUE)
            changed = not why and self._recipe.get(path) != FIELDS[path].default
            line = Content.assemble(
                f"{FIELDS[path].label:{_LABEL}}",
                (f"{value:{_VALUE}} ", "dim" if why else "bold" if changed else ""),
                (path, "dim"),
            )
            yield None if why else path, line

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Say what the field under the cursor is."""
        event.stop()
        self.query_one("#about", Static).update(FIELDS[self.chosen].help if self.chosen else "")


def found(text: str) -> list[str]:
    """Return the fields that hold every word of a text: by their label first, then by their path, then by the rest.

    Without a word all are found, in the order of the form.
    """
    words = text.lower().split()
    ranked: list[tuple[int, str]] = []
    for path in (*ESSENTIALS, *(path for _, paths in ADVANCED for path in paths)):
        field = FIELDS[path]
        label, rest = field.label.lower(), f"{field.help} {field.cost} {' '.join(choices_of(path))}".lower()
        if all(word in f"{label} {path} {rest}" for word in words):
            joined = " ".join(words)
            rank = 0 if label.startswith(joined) else 1 if joined in label else 2 if joined in path else 3
            ranked.append((rank, path))
    return [path for _, path in sorted(ranked, key=lambda one: one[0])]
