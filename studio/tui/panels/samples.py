"""Held-out prompts with the model's answers over the run, and the answer in the data."""

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from studio.core.events import Sampled
from studio.core.text import plain
from studio.runs.history import History

_LONGEST = 4000


class Samples(VerticalScroll):
    """All samples, each prompt once, its answers from the first to the last."""

    DEFAULT_CSS = """
    Samples {
        padding: 0 1;
        & > Static { height: auto; }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        self._text = Static("No samples yet.", markup=False)
        super().__init__(self._text, id=id)
        self._shown: tuple[object, int] = (None, 0)

    def show(self, history: History) -> None:
        """Show the samples; repaints only when there is another one."""
        now = (history.started, len(history.samples))
        if now != self._shown:
            self._shown = now
            self._text.update(samples_text(history.samples) if history.samples else "No samples yet.")


def samples_text(samples: list[Sampled]) -> Content:
    """Return the samples as text that is never read as markup."""
    parts: list[str | tuple[str, str]] = []
    for index in sorted({sample.index for sample in samples}):
        answers = sorted((sample for sample in samples if sample.index == index), key=lambda sample: sample.step)
        parts.append((f"{_foreign(answers[0].prompt)}\n", "bold"))
        for sample in answers:
            when = "before" if sample.step == 0 else f"step {sample.step}"
            parts += [(f"  {when:<9}", "dim"), f"{_indented(sample.answer)}\n"]
        parts += [("  in data  ", "dim"), f"{_indented(answers[0].expected)}\n\n"]
    return Content.assemble(*parts)


def _foreign(text: str) -> str:
    return plain(text.strip(), limit=_LONGEST)


def _indented(text: str) -> str:
    return _foreign(text).replace("\n", "\n" + " " * 11)
