"""A text token by token: what is learnt of it is coloured and stands between arrows, so that colour is not needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

NEW_LINE = "⏎"
_BEGIN, _END, _BORDER = "▸", "◂", "│"
_Part = tuple[str, str]
"""Text and its look."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token.

    Attributes:
        text: What stands for it, free of control characters; `⏎` ends a line.
        look: `learnt`, `special`, `lost` (behind the cut), `note` for a line of its own that is no token, `head` for
            one that begins another text, or empty.
        learnt: Whether it is learnt, which may be true of special and lost tokens too.
    """

    text: str
    look: str = ""
    learnt: bool = False


class TokenView(ScrollView, can_focus=True):
    """Shows tokens, wrapped to the width; scrolls by lines."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("home", "scroll_home", "Begin of the row", show=False),
        Binding("end", "scroll_end", "End of the row", show=False),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "token-view--learnt",
        "token-view--special",
        "token-view--lost",
        "token-view--note",
        "token-view--head",
        "token-view--mark",
        "token-view--found",
    }

    DEFAULT_CSS = """
    TokenView {
        width: 1fr;
        height: 1fr;
        overflow: hidden auto;
        scrollbar-size-vertical: 1;
        & > .token-view--learnt { color: $text-success; text-style: bold; }
        & > .token-view--special { color: $text-accent; }
        & > .token-view--lost { color: $text-error; text-style: strike; }
        & > .token-view--note { color: $text-warning; text-style: italic; }
        & > .token-view--head { color: $text-primary; text-style: bold; }
        & > .token-view--mark { color: $text-success; text-style: bold reverse; }
        & > .token-view--found { color: $text-warning; text-style: reverse; }
    }
    """

    borders: reactive[bool] = reactive(False)
    """Whether a line stands between every two tokens."""

    def __init__(self, *, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        super().__init__(id=id)
        self._tokens: tuple[Token, ...] = ()
        self._sought = ""
        self._lines: list[list[_Part]] = []

    @property
    def free_rows(self) -> int:
        """Lines of the view that are empty below the last one."""
        return max(0, self.size.height - len(self._lines))

    @property
    def text(self) -> str:
        """All lines, as they are shown."""
        return "\n".join("".join(part for part, _ in line) for line in self._lines)

    def watch_borders(self) -> None:
        """Lay the tokens out again."""
        self._lay_out()

    def show(self, tokens: Sequence[Token], sought: str = "") -> None:
        """Show other tokens from their beginning, or from where a text stands that is sought in any letter case."""
        self._tokens, self._sought = tuple(tokens), sought.casefold()
        self._lay_out()
        found = next((row for row, line in enumerate(self._lines) if any(look == "found" for _, look in line)), 0)
        self.scroll_to(y=max(0, found - self.size.height // 2), animate=False)

    def add(self, tokens: Sequence[Token]) -> None:
        """Show further tokens below those that are shown, without scrolling."""
        self._tokens += tuple(tokens)
        self._lay_out()

    def render_line(self, y: int) -> Strip:
        """Return the line under the scroll position."""
        row, width = self.scroll_offset.y + y, self.scrollable_content_region.width
        line = self._lines[row] if row < len(self._lines) else []
        segments = [Segment(text, self._style(look)) for text, look in line]
        return Strip(segments).adjust_cell_length(width, self.rich_style)

    def on_resize(self) -> None:
        """Wrap for the new width."""
        self._lay_out()

    def _style(self, look: str) -> Style:
        return self.get_component_rich_style(f"token-view--{look}") if look else self.rich_style

    def _lay_out(self) -> None:
        width = self.scrollable_content_region.width
        if width > 0:
            self._lines = list(_wrapped(self._parts(), width))
            self.virtual_size = Size(width, len(self._lines))
        self.refresh()

    def _parts(self) -> Iterator[_Part]:
        """Yield texts with their looks; where something is sought, the tokens that it lies in look `found`."""
        found = _found(self._tokens, self._sought)
        inside = False
        for place, token in enumerate(self._tokens):
            if token.look in ("note", "head"):
                if inside:
                    yield _END, "mark"
                    inside = False
                above = " \n" if token.look == "head" else ""
                yield f"\n{above}{token.text}\n", token.look
                continue
            if token.learnt != inside:
                yield (_BEGIN if token.learnt else _END), "mark"
                inside = token.learnt
            elif self.borders and place and token.text:
                yield _BORDER, "note"
            yield token.text, "found" if place in found else token.look
        if inside:
            yield _END, "mark"


def _found(tokens: Sequence[Token], sought: str) -> set[int]:
    """Return the places of the tokens in which a text lies."""
    if not sought:
        return set()
    text, places = "", list[int]()
    for place, token in enumerate(tokens):
        # `casefold` may change a length, so that the place is kept for each character of what it makes.
        folded = token.text.casefold().replace(NEW_LINE, "\n")
        text += folded
        places += [place] * len(folded)
    found, begin = set[int](), text.find(sought)
    while begin >= 0:
        found.update(places[begin : begin + len(sought)])
        begin = text.find(sought, begin + len(sought))
    return found


def _wrapped(parts: Iterator[_Part], width: int) -> Iterator[list[_Part]]:
    """Yield lines of at most `width` cells; a line ends behind a `⏎`, and at a new line, which is not shown."""
    line: list[_Part] = []
    used = 0
    for text, look in parts:
        for piece in _lines_of(text):
            rest = piece.rstrip("\n")
            while rest:
                cells = cell_len(rest)
                fits = len(rest) if used + cells <= width else _fitting(rest, width - used)
                if used and fits < len(rest) and (cells <= width or not fits):  # a token is cut only where it must be
                    yield line
                    line, used = [], 0
                    continue
                shown, rest = rest[: max(1, fits)], rest[max(1, fits) :]
                used += cell_len(shown)
                if line and line[-1][1] == look:
                    line[-1] = line[-1][0] + shown, look
                else:
                    line.append((shown, look))
            if piece.endswith(NEW_LINE) or (piece.endswith("\n") and line):
                yield line
                line, used = [], 0
    if line:
        yield line


def _lines_of(text: str) -> list[str]:
    """Return a text cut behind each of its ends of a line."""
    if NEW_LINE not in text and "\n" not in text:
        return [text]
    return text.replace(NEW_LINE, f"{NEW_LINE}\0").replace("\n", "\n\0").removesuffix("\0").split("\0")


def _fitting(text: str, cells: int) -> int:
    """Return how many characters of a text fit into so many cells."""
    used = 0
    for count, character in enumerate(text):
        used += cell_len(character)
        if used > cells:
            return count
    return len(text)
