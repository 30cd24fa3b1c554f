"""Lists that show what is chosen without colours: one line, or several lines of which the first is always chosen."""

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from studio.core.text import plain

_CSS = """
    {name} {{
        height: auto;
        border: none;
        padding: 0 1;
        background: $background;
        &:focus {{ border: none; }}
    }}
"""


class PickOne(OptionList):
    """The highlighted line is the choice."""

    DEFAULT_CSS = _CSS.format(name="PickOne")

    def __init__(self, lines: Sequence[str] = (), *, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Offer lines; the first is chosen."""
        super().__init__(id=id, markup=False)
        self._words: list[str] = []
        self.fill(lines)

    def fill(self, lines: Sequence[str], chosen: int = 0) -> None:
        """Offer other lines."""
        self._words = [plain(line, one_line=True) for line in lines]
        self.clear_options()
        self.add_options([Option(_line("( )", line)) for line in self._words])
        self.highlighted = chosen if lines else None
        self._mark()

    @property
    def chosen(self) -> int:
        """Place of the chosen line."""
        return self.highlighted or 0

    def watch_highlighted(self, highlighted: int | None) -> None:
        """Move the mark with the choice."""
        super().watch_highlighted(highlighted)
        self._mark()

    def _mark(self) -> None:
        for place, line in enumerate(self._words[: self.option_count]):
            self.replace_option_prompt_at_index(place, _line("(•)" if place == self.highlighted else "( )", line))


class PickMany(OptionList):
    """Space or enter chooses a line or drops it; the first line is always chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("space", "select", "In/out", show=False)]
    DEFAULT_CSS = _CSS.format(name="PickMany")

    class Changed(Message):
        """Other lines are chosen."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        super().__init__(id=id, markup=False)
        self._words: dict[str, str] = {}
        self._in: set[str] = set()

    def fill(self, lines: dict[str, str]) -> None:
        """Offer lines by key; the first is chosen."""
        self._words = lines
        self._in = set(list(lines)[:1])
        self.clear_options()
        self.add_options([Option(self._prompt(key), id=key) for key in lines])
        self.highlighted = 0 if lines else None

    @property
    def chosen(self) -> list[str]:
        """Keys of the chosen lines, in order."""
        return [key for key in self._words if key in self._in]

    def turn(self, key: str) -> None:
        """Choose a line, or drop it where it was chosen."""
        if key != next(iter(self._words), key):
            self._in ^= {key}
            self.replace_option_prompt(key, self._prompt(key))
            self.post_message(self.Changed())

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Choose or drop the line that was taken or clicked."""
        event.stop()
        if event.option_id:
            self.turn(event.option_id)

    def _prompt(self, key: str) -> Content:
        return _line("[x]" if key in self._in else "[ ]", self._words[key])


def _line(mark: str, text: str) -> Content:
    return Content(f"{mark} {text}")
