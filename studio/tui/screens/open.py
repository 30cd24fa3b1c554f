"""The list of recipes to open: the user's files and other tools', those of runs, shipped ones, with what is in each."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static

from studio.core.errors import StudioError
from studio.core.recipe import FIELDS, Recipe
from studio.core.text import plain
from studio.runs.found_recipes import FoundRecipe, files_begun, found_file
from studio.runs.last_recipe import RecipeSource, source_of
from studio.runs.recipe_file import load_recipe
from studio.tui.asks import OpenRun
from studio.tui.changes import differences
from studio.tui.panels.recipe_form import SHOWN
from studio.tui.readable import UNKNOWN, age, number, setting
from studio.tui.screens.dialogs import Offers, Picker

if TYPE_CHECKING:
    from studio.core.foreign.carry import Carrier

_LONGEST_NAME, _LONGEST_LINE = 60, 200
_MOST_HEAD_LINES, _MOST_DIFFERENCES = 6, 12
_FACTS = (
    ("model.base",),
    ("data.path",),
    ("method", "adapter.rank", "adapter.alpha"),
    ("train.micro_batch", "train.accumulation", "train.seq_len"),
    ("train.learning_rate", "train.epochs", "train.steps"),
)
_EMPTY = Content("Nothing is found. Type another word, or the path of a file.")


class OpenScreen(Picker[FoundRecipe]):
    """Hands on a recipe that can be read, and closes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+o", "watch", "Show the run", show=False, priority=True),
    ]

    DEFAULT_CSS = """
    OpenScreen {
        & > Vertical { width: 92%; max-width: 160; height: 90%; }
        & Horizontal { height: 1fr; layout: vertical; }
        & #offers { height: 2fr; }
        & VerticalScroll { height: 3fr; padding: 0 1; border-top: solid $foreground 20%; }
    }
    OpenScreen.-wide {
        & Horizontal { layout: horizontal; }
        & #offers { width: 1fr; height: 1fr; }
        & VerticalScroll { width: 1fr; height: 1fr; border-top: none; border-left: solid $foreground 20%; }
    }
    """

    class Found(Message):
        """The recipes were looked for."""

        def __init__(self, found: list[FoundRecipe]) -> None:
            """Carry them."""
            super().__init__()
            self.found = found

    def __init__(
        self,
        current: Recipe,
        find: Callable[[], list[FoundRecipe]],
        opened: Callable[[Recipe, RecipeSource | None], None],
    ) -> None:
        """Offer recipes.

        Args:
            current: The recipe on the screen, with which others are compared.
            find: Finds recipes; called in a thread.
            opened: Takes the recipe that was chosen, with its file where that is the user's.
        """
        super().__init__()
        self._current, self._find, self._opened = current, find, opened
        self._found: list[FoundRecipe] | None = None
        self._clicked: FoundRecipe | None = None

    def compose(self) -> ComposeResult:
        """Make the parts: filter, list, what is in the chosen recipe."""
        with Vertical() as box:
            box.border_title = "Open a recipe"
            box.border_subtitle = "⏎ open it  esc back"
            yield Input(placeholder="type to narrow: a name, run, shipped, qlora; or a path", compact=True, id="filter")
            with Horizontal():
                yield Offers()
                with VerticalScroll(can_focus=False):
                    yield Static("Looking for recipes ...", id="preview", markup=False)

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#filter", Input).focus()
        self._look()

    @work(thread=True, group="open")
    def _look(self) -> None:
        self.post_message(self.Found(self._find()))

    def on_open_screen_found(self, message: Found) -> None:
        """Show what was found."""
        self._found = message.found
        self.show_offers()

    def offers(self, text: str) -> Iterable[tuple[FoundRecipe | None, Content]]:
        """Return files that the text begins as a path, and what it narrows the rest to; at least the file it names."""
        word, found = text.strip(), self._found or []
        words = text.lower().split()
        begun = files_begun(word)
        typed = {each.path for each in begun}
        through = [each for each in found if each.path not in typed and all(part in each.searched for part in words)]
        if word and not begun and not through:
            begun = [replace(found_file(Path(word.replace("\0", ""))), name=word)]
        widest = max((len(_name(each)) for each in (*begun, *through)), default=0)
        kinds = max((len(each.kind) for each in (*begun, *through) if each.kind != "shipped"), default=0)
        heading = ""
        for each in (*begun, *through):
            kind = "SHIPPED WITH THE PROGRAM" if each.kind == "shipped" else "FILES" if each in begun else "YOURS"
            if kind != heading:
                heading = kind
                yield None, Content.styled(kind, "bold $text-primary")
            told = "" if each.kind == "shipped" else f"  {each.kind:{kinds}}  {age(time.time() - each.changed_at)}"
            yield each, Content.assemble(f"{_name(each):{widest}}", (told if each.changed_at else "", "dim"))

    def show_offers(self) -> None:
        """Show what the filter lets through, and what is in the first of it."""
        super().show_offers()
        self._preview()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show what is in the recipe under the cursor."""
        event.stop()
        self._preview()

    def take(self, answer: FoundRecipe) -> None:
        """Hand on a recipe that can be read; of another the preview says already why it cannot."""
        recipe, carrier = _read(answer, self._current)
        if not isinstance(recipe, str):
            self.dismiss(None)
            self._opened(recipe, source_of(answer.path) if answer.kind == "file" else None)
            if carrier is not None and (lost := [one for one in carrier.left if one.matters]):
                what = "1 setting was" if len(lost) == 1 else f"{len(lost)} settings were"
                self.app.notify(f"{what} not carried over: lora-studio import {_name(answer)}", markup=False)

    def click(self, answer: FoundRecipe) -> None:
        """Look into what was clicked; a second click on it opens it."""
        if answer is self._clicked:
            self.take(answer)
        self._clicked = answer

    def action_watch(self) -> None:
        """Show the run under the cursor in place of opening its recipe."""
        if self.chosen is not None and self.chosen.run is not None:
            paths = self.chosen.run.paths
            self.dismiss(None)
            self.app.post_message(OpenRun(paths))

    def _preview(self) -> None:
        chosen = self.chosen
        if self._found is not None:
            self.query_one("#preview", Static).update(preview_of(chosen, self._current) if chosen else _EMPTY)
        run = "  ^o show the run" if chosen and chosen.run else ""
        self.query_one(Vertical).border_subtitle = f"⏎ open its recipe{run}  esc back" if run else "⏎ open it  esc back"


def preview_of(found: FoundRecipe, current: Recipe) -> Content:
    """Return what a recipe holds, where it comes from, and how it differs from the one on the screen."""
    recipe, carrier = _read(found, current)
    title = [(f"{_name(found)}\n", "bold"), *_run_lines(found)]
    if isinstance(recipe, str):
        return Content.assemble(*title, (f"\nIt cannot be opened: {plain(recipe)}", "$text-error"))
    lines: list[str | tuple[str, str]] = [*title]
    for paths in _FACTS:
        for path in paths:
            if path == "train.steps" and not recipe.train.steps:
                continue
            if path == "train.epochs" and recipe.train.steps:
                continue
            value = recipe.get(path)
            written = setting(value) if isinstance(value, float) else FIELDS[path].kind.written(value)
            shown = plain(SHOWN.get(written, written), one_line=True, limit=_LONGEST_NAME)
            lines += [(f"{FIELDS[path].label} ", "dim"), f"{shown}   "]
        lines.append("\n")
    lines += _import_lines(carrier, current) if carrier is not None else []
    told = [line for line in differences(current, recipe) if not line.startswith(f"{FIELDS['name'].label} ")]
    lines.append(("\nCompared with the recipe on the screen\n", "bold"))
    lines += [f"  {line}\n" for line in told[:_MOST_DIFFERENCES]] or ["  it is the same\n"]
    if len(told) > _MOST_DIFFERENCES:
        lines.append(f"  and {len(told) - _MOST_DIFFERENCES} more\n")
    if carrier is None and (head := _head_of(found.path)):
        lines += [("\n", ""), (f"{head}\n", "dim")]
    return Content.assemble(*lines, (f"\n{plain(str(found.path), one_line=True, limit=_LONGEST_LINE)}", "dim"))


def _run_lines(found: FoundRecipe) -> list[tuple[str, str]]:
    if (run := found.run) is None:
        return []
    steps = f", {run.last_step} of {run.total or UNKNOWN} steps" if run.last_step is not None else ""
    losses = "".join(
        f", {name} {number(loss)}" for name, loss in (("loss", run.last_loss), ("held-out", run.eval_loss)) if loss
    )
    note = f"\n{plain(run.note, one_line=True)}" if run.note else ""
    return [(f"{run.status}{steps}{losses}{note}\n", "")]


def _import_lines(carrier: "Carrier", current: Recipe) -> list[str | tuple[str, str]]:
    """Return what became of another tool's settings: how many were carried over, and what has no place here."""
    from studio.probe.foreign_file import lacks  # noqa: PLC0415  not needed for recipes

    given = [one for one in carrier.carried.values() if one.setting]
    lost = [one for one in carrier.left if one.matters]
    lines: list[str | tuple[str, str]] = [(f"\nImported from {carrier.tool}\n", "bold")]
    lines.append(f"  {len(given)} fields of the recipe say what its settings say\n")
    for field, _ in lacks(carrier):
        value = plain(str(current.get(field)), one_line=True, limit=_LONGEST_NAME)
        lines.append((f"  it names no {FIELDS[field].label.lower()}: {value} stays\n", "$text-warning"))
    for one in lost[:_MOST_DIFFERENCES]:
        lines += [("  not carried: ", "$text-warning"), f"{one.setting.words}: ", (f"{plain(one.why)}\n", "dim")]
    if len(lost) > _MOST_DIFFERENCES:
        lines.append(f"  and {len(lost) - _MOST_DIFFERENCES} more: lora-studio import tells them\n")
    return lines


def _read(found: FoundRecipe, current: Recipe) -> "tuple[Recipe | str, Carrier | None]":
    """Return the recipe, or why it cannot be read; and of another tool's file what was carried over.

    What that does not name, base or data, stays as on the screen.
    """
    try:
        if found.kind != "import":
            return load_recipe(found.path), None
        from studio.probe.foreign_file import lacks, read_foreign, recipe_of  # noqa: PLC0415  20 ms for YAML

        carrier = read_foreign(found.path)
        missing = {field for field, _ in lacks(carrier)}
        base = current.model.base if "model.base" in missing else None
        data = str(current.data.path) if "data.path" in missing else None
        return recipe_of(carrier, found.path, base=base, data=data), carrier
    except StudioError as error:
        return str(error), None


def _head_of(path: Path) -> str:
    """Return the comment at the beginning of a recipe's file, without its marks."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line.rstrip() for _, line in zip(range(_MOST_HEAD_LINES), file, strict=False)]
    except OSError:
        return ""
    kept = lines[: next((place for place, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return "\n".join(plain(line.lstrip("# "), one_line=True, limit=_LONGEST_LINE) for line in kept)


def _name(found: FoundRecipe) -> str:
    return plain(found.name, one_line=True, limit=_LONGEST_NAME)
