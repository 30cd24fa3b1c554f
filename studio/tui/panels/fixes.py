"""What would make a recipe fit, or save memory for nothing: a list to choose from, and its texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from studio.tui.readable import gib

if TYPE_CHECKING:  # the estimator takes 0.1 s to import: a thread brings it after the first frame
    from studio.core.fit import Fix

_MOST = 9
_Parts = list[str | tuple[str, str]]


class FixList(OptionList):
    """Offers fixes, the one that `f` makes first; hidden where there are none. Enter, a digit or a click takes one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Take it"),
        *(Binding(str(number), f"take({number})", f"Take number {number}", show=False) for number in range(1, 10)),
    ]

    DEFAULT_CSS = """
    FixList {
        display: none;
        height: auto;
        max-height: 100%;
        padding: 0 1;
        border: round $foreground 40%;
        border-title-style: bold;
        border-title-color: $text-success;
        border-subtitle-color: $text-muted;
        background: $background;
        scrollbar-size-vertical: 1;
        &.-shown { display: block; }
        &.-over { border-title-color: $text-error; }
        &:focus { border: round $accent; }
        & > .option-list--option-disabled { color: $text-error; }
    }
    """

    class Chosen(Message):
        """The user takes a fix."""

        def __init__(self, fix: "Fix") -> None:
            """Carry it."""
            super().__init__()
            self.fix = fix

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        super().__init__(id=id, markup=False)
        self._offered: list[Fix | None] = []
        self._shown: object = None

    def show(self, fixes: "Sequence[Fix]", first: "Fix | None", *, over: bool, keys: bool) -> None:
        """Offer fixes, or hide where there are none.

        Args:
            fixes: One of each kind.
            first: What `f` does; None where nothing fits, or where the recipe fits as it is.
            over: Whether the recipe does not fit safely as it is.
            keys: Whether to name keys.
        """
        if (shown := (list(fixes), first, over, keys)) == self._shown:
            return
        self._shown = shown
        lines = fix_lines(fixes, first, over=over, key=keys)
        self.border_title = "What would make it fit" if over else "Saves memory for nothing"
        self.border_subtitle = ("x goes here, ⏎ takes one" if fixes else "") if keys else ""
        self.set_class(over, "-over")
        before, self._offered = self.highlighted, [fix for fix, _ in lines]
        self.set_options([Option(line, disabled=fix is None) for fix, line in lines])
        if self.option_count:
            self.highlighted = min(before or 0, self.option_count - 1)
        if not lines and self.has_focus:
            self.screen.focus_previous()
        if bool(lines) != self.has_class("-shown"):
            self.set_class(bool(lines), "-shown")
            self.refresh_bindings()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take what was chosen."""
        event.stop()
        self.action_take(event.option_index + 1)

    def action_take(self, number: int) -> None:
        """Take a fix by its number from 1."""
        if number <= len(self._offered) and (fix := self._offered[number - 1]) is not None:
            self.post_message(self.Chosen(fix))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the rows that the fixes take; textual fails where a terminal leaves no cell for them."""
        return super().get_content_height(container, viewport, max(1, width))

    def action_cursor_up(self) -> None:
        """Move up, from the first one out of the list."""
        if self.highlighted in (None, 0):
            self.screen.focus_previous()
        else:
            super().action_cursor_up()

    def action_cursor_down(self) -> None:
        """Move down, but not around."""
        if self.highlighted != self.option_count - 1:
            super().action_cursor_down()


def fix_lines(
    fixes: "Sequence[Fix]", first: "Fix | None", *, over: bool, key: bool = True
) -> "list[tuple[Fix | None, Content]]":
    """Return each fix with its text, that of `f` first; None for a line that cannot be chosen.

    Args:
        fixes: One of each kind.
        first: What `f` does, where it does something.
        over: Whether the recipe does not fit safely as it is.
        key: Whether to name the key.
    """
    others = [fix for fix in fixes if first is None or fix.changes != first.changes]
    lines: list[tuple[Fix | None, Content]] = []
    if first is not None:
        lines.append((first, _line(first, 1, _makes(first, key=key))))
    elif over:
        lines.append((None, Content("Nothing here makes it fit: take a smaller model or a larger card.")))
    lines += [(fix, _line(fix, number)) for number, fix in enumerate(others, len(lines) + 1) if number <= _MOST]
    return lines


def saving_words(fix: "Fix") -> str:
    """Return what a fix saves, what it takes of main memory, and whether it fits; without a card that is not known."""
    then = {"fits": "", "tight": ", then tight"}.get(fix.verdict, ", not enough alone") if fix.budget_bytes else ""
    streams = any(path == "model.stream" for path, _ in fix.settings)
    waits = f", {gib(fix.estimate.host.total)} GiB of main memory" if streams else ""
    return f"-{gib(fix.saved_bytes)} GiB{waits}{then}"


def applied_text(fix: "Fix") -> str:
    """Return what a fix has changed, in one line."""
    verdict = f", {fix.verdict}" if fix.budget_bytes else ""
    return f"{fix.words}: now {gib(fix.estimate.device.expected)} GiB{verdict}. u undoes it."


def _makes(first: "Fix", *, key: bool) -> str:
    return f"{'f' if key else 'This'} {'makes it fit' if first.verdict == 'fits' else 'comes close'}: "


def _line(fix: "Fix", number: int, makes: str = "") -> Content:
    parts: _Parts = [(makes, "$text-success bold") if makes else (f"{number} ", "dim"), (fix.words, "bold")]
    return Content.assemble(*parts, f"\n  {saving_words(fix)}; ", (fix.price, "dim"))
