"""Held-out prompts with the model's answers over the run, and the answer in the data."""

from collections.abc import Iterator

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from studio.core.events import Sampled
from studio.core.text import plain
from studio.runs.history import History
from widgets.labelled_text import LabelledText

_LONGEST = 4000
_WHEN = 14


class Samples(VerticalScroll):
    """All samples, each prompt once, its answers from the first to the last."""

    DEFAULT_CSS = """
    Samples {
        padding: 0 1;
        scrollbar-size-vertical: 1;
        & > .prompt { height: auto; text-style: bold; }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        super().__init__(Static("No samples yet.", markup=False), id=id)
        self._shown: tuple[object, int] = (None, 0)

    def show(self, history: History) -> None:
        """Show the samples; does nothing unless there is another one."""
        now = (history.started, len(history.samples))
        if now != self._shown and history.samples:
            self._shown = now
            self.remove_children()
            self.mount_all(rows_of(history.samples))


def rows_of(samples: list[Sampled]) -> Iterator[Widget]:
    """Yield a prompt, the answers to it in the order of steps, what the data says; then the next prompt."""
    for index in sorted({sample.index for sample in samples}):
        answers = sorted((sample for sample in samples if sample.index == index), key=lambda sample: sample.step)
        yield Static(Content(_foreign(answers[0].prompt)), classes="prompt", markup=False)
        for sample in answers:
            yield _answer("before" if sample.step == 0 else f"step {sample.step}", sample.answer)
        yield _answer("in the data", answers[0].expected)


def _answer(when: str, text: str) -> Widget:
    return LabelledText(Content.styled(f" {when}", "$text-muted"), _foreign(text), label_width=_WHEN)


def _foreign(text: str) -> str:
    return plain(text.strip(), limit=_LONGEST)
