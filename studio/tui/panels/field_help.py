"""Beside the form: what the field under the cursor is and costs, and what keeps the recipe from running."""

from collections.abc import Sequence

from textual.content import Content
from textual.widgets import Static

from studio.core.recipe import FIELDS
from studio.core.text import plain
from studio.core.value_kinds import Number
from studio.tui.panels.recipe_form import FOLD_HELP, options_of

_EDITED = "Enter edits it; then enter accepts it, and escape cancels."
_TURNED = f"The arrows turn it. {_EDITED}"


class FieldHelp(Static):
    """Shows what is going on and what is wrong; below that, it explains the current field."""

    DEFAULT_CSS = """
    FieldHelp {
        border-title-color: $text-primary;
        border-title-style: bold;
        width: 1fr;
        height: 1fr;
        padding: 0 1;
        overflow: hidden auto;
    }
    """

    def __init__(self) -> None:
        """Start empty."""
        super().__init__(markup=False)
        self._path: str | None = None
        self._problems: Sequence[str] = ()
        self._busy = ""

    def show_field(self, path: str) -> None:
        """Explain a field, or with an empty path the head of the folded ones."""
        self._path = path
        self.border_title = f"{FIELDS[path].label} · {path}" if path else "Advanced"
        self._show()

    def show_problems(self, problems: Sequence[str]) -> None:
        """List what is wrong with the recipe; an empty list where nothing is."""
        self._problems = problems
        self._show()

    def show_busy(self, words: str) -> None:
        """Say what is going on; empty when nothing is."""
        self._busy = words
        self._show()

    def _show(self) -> None:
        text = field_help_text(self._path, self._problems, self._busy)
        if text != self.content:  # each turn of a field comes here, and an update lays out the whole screen
            self.update(text)


def field_help_text(path: str | None, problems: Sequence[str], busy: str) -> Content:
    """Return what stands beside the form; problems are foreign text and never read as markup."""
    parts: list[str | tuple[str, str]] = []
    if busy:
        parts.append((f"{busy}\n\n", "$text-warning bold"))
    if problems:
        head = "This keeps the recipe from running:\n" if len(problems) > 1 else "The recipe cannot run:\n"
        parts.append((head, "$text-error bold"))
        parts += [f"{plain(problem)}\n" for problem in problems]
        parts.append("\n")
    if path == "":
        parts.append(f"{FOLD_HELP}\n")
    elif path:
        field = FIELDS[path]
        parts.append(f"{field.help}\n")
        if field.cost:
            parts.append((f"{field.cost}\n", "dim"))
        if isinstance(field.kind, Number):
            parts.append((f"{field.kind.allowed}. ", "dim"))
        turned = options_of(path) or (isinstance(field.kind, Number) and field.kind.stops)
        parts.append((f"{_TURNED}\n" if turned else f"{_EDITED}\n", "dim"))
    return Content.assemble(*parts)
