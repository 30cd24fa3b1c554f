"""A word beside a text that wraps in a column of its own."""

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static


class LabelledText(Horizontal):
    """Label and text. Neither is read as markup; the text may change, the label stays."""

    DEFAULT_CSS = """
    LabelledText {
        height: auto;
        & > Static { height: auto; width: 1fr; }
    }
    """

    def __init__(
        self,
        label: str | Content,
        text: str | Content = "",
        *,
        label_width: int,
        id: str | None = None,  # noqa: A002  Textual's own name
    ) -> None:
        """Show `label` in `label_width` cells, then `text`."""
        super().__init__(id=id)
        self._label, self._text, self._label_width = label, text, label_width

    def compose(self) -> ComposeResult:
        """Label, text."""
        label = Static(_content(self._label), markup=False)
        label.styles.width = self._label_width
        yield label
        yield Static(_content(self._text), markup=False)

    def update(self, text: str | Content) -> None:
        """Show another text; repaint only where it differs."""
        if _content(text) != _content(self._text):
            self._text = text
            self.query(Static).last().update(_content(text))


def _content(text: str | Content) -> Content:
    return text if isinstance(text, Content) else Content(text)
