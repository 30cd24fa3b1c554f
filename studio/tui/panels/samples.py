"""Held-out prompts with the model's answers over the run, and the answer in the data."""

from collections.abc import Iterator

from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from studio.core.events import Sampled
from studio.core.text import plain
from studio.runs.history import History
from studio.runs.status import Status
from widgets.labelled_text import LabelledText

_LONGEST = 4000
_WHEN = 14


class Samples(VerticalScroll):
    """Shows all samples: each prompt once, and below it its answers from the first to the last."""

    DEFAULT_CSS = """
    Samples {
        padding: 0 1;
        scrollbar-size-vertical: 1;
        & > .prompt { height: auto; text-style: bold; }
    }
    """

    def __init__(self, id: str | None = None) -> None:  # noqa: A002  Textual's own name
        """Start empty."""
        self._none = Static("No samples yet.", markup=False)
        super().__init__(self._none, id=id)
        self.border_title = "Samples"
        self._shown: tuple[object, int] = (None, 0)

    def show(self, history: History, status: Status) -> None:
        """Show the samples, or why there are none; does nothing unless that has changed."""
        now = (history.started, len(history.samples))
        if history.samples:
            if now != self._shown:
                self._shown = now
                self.remove_children()
                self.mount_all(rows_of(history.samples))
        elif (why := why_none(history, status)) != self._none.content:
            self._none.update(why)


def why_none(history: History, status: Status) -> str:
    """Return why a run has no samples."""
    if history.planned is not None and not history.planned.held_out_rows:
        return "No samples: no row is held out, so there is none to ask."
    # Samples follow an evaluation. When the second one comes and there is still no sample, none will ever come.
    if len(history.evals) > 1 or (history.evals and status is Status.finished):
        return "No samples: the recipe asks for none (eval.samples is 0)."
    if status.live:
        return "No samples yet: they are written each time the held-out rows have been measured."
    return "No samples: the run ended before the first were written."


def rows_of(samples: list[Sampled]) -> Iterator[Widget]:
    """Yield a prompt, the answers to it in the order of steps, what the data says; then the next prompt."""
    for index in sorted({sample.index for sample in samples}):
        answers = sorted((sample for sample in samples if sample.index == index), key=lambda sample: sample.step)
        yield Static(Content(_foreign(answers[0].prompt)), classes="prompt", markup=False)
        for sample in answers:
            yield _answer("before" if sample.step == 0 else f"step {sample.step}", sample.answer)
        yield _answer("in the data", answers[0].expected)


def _answer(when: str, text: str) -> Widget:
    return LabelledText(Content.styled(f" {when}", "dim"), _foreign(text), label_width=_WHEN)


def _foreign(text: str) -> str:
    return plain(text.strip(), limit=_LONGEST)
