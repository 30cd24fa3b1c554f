"""What is worth knowing of the run under the cursor of a list: how it stands, what came of it, how it differs."""

from collections.abc import Sequence
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from studio.core.errors import StudioError
from studio.core.export_formats import export_checks
from studio.core.recipe import Recipe, field_text
from studio.core.text import plain
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.log_parts import sample_steps
from studio.runs.store import RunInfo
from studio.runs.summary import differing_fields, gain_of
from studio.runs.watch import RunWatch
from studio.tui.panels.outcome import TRAIN
from studio.tui.panels.runs_list import GLYPHS, LONGEST, group_of
from studio.tui.readable import duration, number, setting
from widgets.line_plot import Curve, LinePlot

_READ_WHOLE_BYTES = 640 * 1024
"""About 4000 steps are read whole, which takes some 40 ms (`studio/tui/feed.py`); of a log with more of them behind its
index a sample."""
_LONGEST = 400
FIRST_RUN = "\n\n".join(
    (
        "A run goes on when this program is closed, and is found here again.",
        "It leaves its losses, the held-out loss before and after, answers on the way, checkpoints to go on from "
        "(R), and an adapter, which you can ask (t), merge and export (m) and audit (a).",
        "Without data of your own: lora-studio demo trains the embedded model on this machine.",
    )
)
"""What is said in place of a run before the first one."""
_MOST_DIFFERENCES = 12
_CURVES = (Curve("train", "each step"), Curve("held_out", "held-out", "dots", 2))


@dataclass(frozen=True, slots=True)
class Closer:
    """What is read of a run beyond its line in the list.

    Attributes:
        info: Its line.
        recipe: What it was trained from; None for other jobs, or where it cannot be read.
        history: What it told; None where its log is long and has no index.
        curve: Steps and losses.
        before: The name of the training before it; empty where there is none.
        differing: The fields in which the recipes of both differ: path, the value before, the value now.
    """

    info: RunInfo
    recipe: Recipe | None
    history: History | None
    curve: tuple[Sequence[int], Sequence[float]]
    before: str
    differing: tuple[tuple[str, str, str], ...]


def look_closer(info: RunInfo, before: RunInfo | None) -> Closer:
    """Read a run, and the recipe of the training before it. It takes some 40 ms: ask from a thread."""
    history: History | None = None
    curve: tuple[Sequence[int], Sequence[float]]
    watch = RunWatch(info.paths)
    watch.take_index()
    if watch.behind <= _READ_WHOLE_BYTES:
        history = watch.catch_up()
        curve = (list(history.train.steps), list(history.train.losses))
    else:
        sample = sample_steps(info.paths.events)
        curve = ([event.step for event in sample], [event.loss for event in sample])
    recipe, earlier = _recipe(info), _recipe(before) if before is not None else None
    differing = differing_fields([earlier, recipe]) if earlier is not None and recipe is not None else {}
    return Closer(
        info,
        recipe,
        history,
        curve,
        before.name if before is not None and earlier is not None and recipe is not None else "",
        tuple((path, field_text(path, old), field_text(path, new)) for path, (old, new) in differing.items()),
    )


def _recipe(info: RunInfo) -> Recipe | None:
    try:
        return read_job(info.paths, Recipe)
    except StudioError:
        return None


class RunPreview(Vertical):
    """The text; below it the loss of a run with the class `-has-curve`, where the screen has room and displays it."""

    DEFAULT_CSS = """
    RunPreview {
        padding: 0 1;
        & > Static { height: auto; max-height: 100%; }
        & > LinePlot { display: none; margin-top: 1; min-height: 8; }
    }
    """

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self._text = Static("", markup=False)
        self._plot = LinePlot(_CURVES, title="loss", x_label="step")
        self._shown: object = None

    def compose(self) -> ComposeResult:
        """Make the parts: text, loss."""
        yield self._text
        yield self._plot

    def show(self, closer: Closer | None, otherwise: str = "") -> None:
        """Show a run, or else some words; does nothing unless something has changed."""
        shown = otherwise if closer is None else (closer.info, closer.before, closer.differing)
        if shown == self._shown:
            return
        self._shown = shown
        self.border_title = Content(plain(closer.info.name, one_line=True, limit=LONGEST)) if closer else None
        self._text.update(Content(otherwise) if closer is None else preview_text(closer))
        steps, losses = closer.curve if closer is not None else ((), ())
        self.set_class(bool(steps), "-has-curve")
        if closer is not None:
            evals = closer.history.evals if closer.history else []
            self._plot.x_total = float(closer.info.total or 0)
            self._plot.replace("train", steps, losses)
            self._plot.replace("held_out", [event.step for event in evals], [event.loss for event in evals])


def preview_text(closer: Closer) -> Content:
    """Return what is said of a run; foreign text is made harmless."""
    info, history = closer.info, closer.history
    lines = [_standing(closer), _what(closer), *_came_of_it(info, history)]
    if info.note:
        lines.append(Content.assemble(("note  ", "dim"), f"“{plain(info.note, one_line=True)}”"))
    warned = [f"! {plain(words, one_line=True, limit=_LONGEST)}" for words in info.warnings]
    lines += [Content.styled(words, "$text-warning") for words in warned]
    return Content("\n").join([*lines, *_differences(closer)])


def _standing(closer: Closer) -> Content:
    info, history = closer.info, closer.history
    glyph, colour = GLYPHS[info.status]
    total = f"/{info.total}" if info.total else ""
    steps = f"  step {info.last_step}{total}" if group_of(info) == TRAIN and info.last_step is not None else ""
    seconds = history.seconds if history is not None else None
    took = f"  {duration(seconds)}" if seconds is not None else ""
    if info.status.live and history is not None and history.eta_seconds:
        took = f"  {duration(history.eta_seconds)} left"
    return Content.assemble((f"{glyph} {info.status}", f"{colour} bold"), f"{steps}{took}")


def _what(closer: Closer) -> Content:
    info, recipe = closer.info, closer.recipe
    model = plain(info.model or "", one_line=True, limit=_LONGEST)
    if recipe is None:
        of_it = f" of {model}" if model else ""
        return Content(f"{plain(info.job or 'a run', one_line=True)}{of_it}")
    method = {"qlora": "QLoRA, 4-bit base", "lora": "LoRA, 16-bit base"}[recipe.method]
    data = ", ".join(plain(word, one_line=True, limit=60) for word in recipe.data.words)
    return Content.assemble(
        (model, "bold"), f"\n{method}, rank {recipe.adapter.rank}, alpha {setting(recipe.adapter.alpha)}  on  {data}"
    )


def _came_of_it(info: RunInfo, history: History | None) -> list[Content]:
    lines = []
    if info.eval_loss is not None:
        before = info.first_eval_loss
        since = f"{number(before)} → " if before is not None and before != info.eval_loss else ""
        lines.append(Content.assemble("held-out loss  ", (f"{since}{number(info.eval_loss)}", "bold")))
    if history is None:
        return lines
    if history.failed is not None:
        why, then = plain(history.failed.message, limit=_LONGEST), plain(history.failed.advice, limit=_LONGEST)
        lines.append(Content.styled(why, "$text-error"))
        lines += [Content(f"what to do: {then}")] if then else []
    elif (gain := gain_of(history)) is not None and not info.status.live:
        lines.append(Content(f"{gain['words'][:1].upper()}{gain['words'][1:]}."))
    if group_of(info) != TRAIN:
        lines += [
            Content(f"{plain(one.what, one_line=True)}: {plain(one.path, one_line=True)}") for one in history.saved
        ]
        lines += [Content(line) for line in export_checks(history.finished.result if history.finished else {})]
    return lines


def _differences(closer: Closer) -> list[Content]:
    if not closer.before:
        return []
    name = plain(closer.before, one_line=True, limit=LONGEST)
    if not closer.differing:
        return [Content.styled(f"the same recipe as {name}, the run before", "dim")]
    shown = closer.differing[:_MOST_DIFFERENCES]
    told = ", ".join(f"{path} {plain(old, one_line=True)} → {plain(new, one_line=True)}" for path, old, new in shown)
    more = len(closer.differing) - len(shown)
    rest = f" and {more} more" if more else ""
    return [Content.assemble((f"differs from {name}, the run before:  ", "dim"), f"{told}{rest}")]
