"""Warnings and what was saved, newest last."""

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from studio.core.left_out import left_out_in_words
from studio.core.text import plain
from studio.runs.history import History
from studio.tui.readable import count, gib

_LONGEST = 2000


class Notes(VerticalScroll):
    """Shows what one should know of a run beside its numbers."""

    DEFAULT_CSS = """
    Notes {
        padding: 0 1;
        & > Static { height: auto; }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        self._text = Static("", markup=False)
        super().__init__(self._text, id=id)
        self.border_title = "Notes"
        self._shown: object = None

    def show(self, history: History) -> None:
        """Show the notes; repaints only when there is another one."""
        now = (history.started, history.planned, len(history.warnings), len(history.saved), history.unknown)
        if now != self._shown:
            self._shown = now
            self._text.update(notes_text(history))


def notes_text(history: History) -> Content:
    """Return the notes as text that is never read as markup."""
    parts: list[str | tuple[str, str]] = []
    if (started := history.started) is not None:
        after = f", continued after step {started.resumed_from}" if started.resumed_from else ""
        words = [plain(word, one_line=True) for word in (started.method, started.model) if word]
        parts.append(f"{' '.join(words)}{after}\n")
    if (planned := history.planned) is not None:
        parts.append(
            f"{count(planned.trainable_parameters)} trainable parameters, {count(planned.rows)} rows to train on, "
            f"{count(planned.held_out_rows)} held out, {plain(planned.dtype)} on {plain(planned.device)}\n"
        )
        if told := left_out_in_words(planned.left_out):
            parts += [("rows     ", "$text-warning bold"), f"{plain(told, one_line=True, limit=_LONGEST)}\n"]
        if planned.four_bit_share and planned.kept_16bit_bytes is not None:
            kept = f"{gib(planned.kept_16bit_bytes)} GiB not quantised"
            parts.append(f"{planned.four_bit_share:.1%} of the layers' weights in 4 bits, {kept}\n")
    for warning in history.warnings:
        parts += [("warning  ", "$text-warning bold"), f"{plain(warning.message, limit=_LONGEST)}\n"]
    for saved in history.saved:
        size = f", {gib(saved.size_bytes)} GiB" if saved.size_bytes and saved.size_bytes > 2**28 else ""
        at = f" at step {saved.step}" if saved.step is not None else ""
        what, path = plain(saved.what, one_line=True), plain(saved.path, one_line=True)
        parts += [("saved    ", "$text-success"), f"{what}{at}: {path}{size}\n"]
    if not history.warnings and not history.saved:
        parts.append(("No warning so far, and nothing saved yet: both are listed here.\n", "dim"))
    if history.unknown:
        parts.append(f"{history.unknown} lines of the log are not known to this version\n")
    return Content.assemble(*parts)
