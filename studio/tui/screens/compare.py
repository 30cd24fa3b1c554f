"""Up to four runs beside each other: curves over each other, recipe differences and outcomes below."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import DataTable, Static

from studio.core.errors import BadInput
from studio.core.recipe import Recipe, field_text
from studio.core.text import plain
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.summary import differing_fields, peak_bytes
from studio.runs.watch import read_history
from studio.tui.readable import UNKNOWN, duration, gib, number
from widgets.key_footer import KeyFooter
from widgets.line_picture import Hue
from widgets.line_plot import Curve, LinePlot
from widgets.smooth import Smoother
from widgets.whole_table import WholeTable

MOST = 4
"""Runs that a plot tells apart by colour."""

_STEPS_PER_LOOK_BACK = 25
"""The smoothed loss looks back over a 25th of the steps, but over 3 at least and 100 at most."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One run of a comparison; the recipe is None where it is no training run or cannot be read."""

    name: str
    recipe: Recipe | None
    history: History


def read_compared(paths: RunPaths) -> Compared:
    """Read a run to the end of its log. Takes about a second for 100 000 steps."""
    try:
        recipe = read_job(paths, Recipe)
    except BadInput:
        recipe = None
    return Compared(plain(paths.name, one_line=True), recipe, read_history(paths))


def difference_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return the fields in which the recipes differ, each with one value per run; the name is no difference."""
    differing = differing_fields([run.recipe for run in runs])
    return [(path, *(field_text(path, value) for value in values)) for path, values in differing.items()]


def outcome_rows(runs: Sequence[Compared]) -> list[tuple[str, ...]]:
    """Return what came of the runs, each row with one value per run."""
    histories = [run.history for run in runs]
    return [
        ("steps", *(f"{history.last_step}/{history.total_steps or '?'}" for history in histories)),
        *_loss_rows(histories),
        ("tokens/s", *(number(h.tokens_per_second) for h in histories)),
        ("peak, GiB", *(gib(peak_bytes(history)) for history in histories)),
        ("time", *(duration(history.seconds) for history in histories)),
    ]


def _loss_rows(histories: Sequence[History]) -> list[tuple[str, ...]]:
    """Return the losses, those of each objective in rows of their own: they are different quantities."""
    objectives = dict.fromkeys(history.objective for history in histories)
    rows = []
    for objective in objectives:
        of_it, same = f" ({objective})" if len(objectives) > 1 else "", [h.objective == objective for h in histories]
        told = list(zip(histories, same, strict=True))
        rows += [
            (f"held-out loss{of_it}", *(number(h.evals[-1].loss) if own and h.evals else UNKNOWN for h, own in told)),
            (
                f"training loss{of_it}",
                *(number(h.train.losses[-1]) if own and h.train.losses else UNKNOWN for h, own in told),
            ),
        ]
    if any(history.train.pairs for history in histories):
        accuracies = [h.evals[-1].accuracy if h.evals else None for h in histories]
        rows.append(("held-out accuracy", *(UNKNOWN if known is None else number(known) for known in accuracies)))
    return rows


class CompareScreen(Screen[None]):
    """Reads the runs once. `e` switches between the smoothed training loss and the held-out loss."""

    HELP = "Runs laid over each other, and the settings in which they differ."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "turn_loss", "Held-out/training"),
        Binding("l", "log_axis", "Log axis"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    CompareScreen {
        & #compare-head { height: 1; padding: 0 1; text-style: bold; }
        & LinePlot { height: 3fr; padding: 0 1; }
        & DataTable { height: 2fr; }
    }
    """

    class Read(Message):
        """The runs were read."""

        def __init__(self, runs: list[Compared]) -> None:
            """Carry them."""
            super().__init__()
            self.runs = runs

    def __init__(self, paths: Sequence[RunPaths]) -> None:
        """Compare two to four runs."""
        super().__init__()
        self._paths = tuple(paths)[:MOST]
        self._runs: list[Compared] = []
        self._held_out = False

    def compose(self) -> ComposeResult:
        """Make the parts: head, plot, table, keys."""
        curves = [
            Curve(str(index), _short(paths.name, len(self._paths)), hue=cast(Hue, index))
            for index, paths in enumerate(self._paths, start=1)
        ]
        yield Static("Reading the runs ...", id="compare-head", markup=False)
        yield LinePlot(curves, title="", x_label="step")
        yield WholeTable(cursor_type="row", zebra_stripes=True)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to read the runs."""
        self._read()

    def on_compare_screen_read(self, message: Read) -> None:
        """Show what was read."""
        self._runs = message.runs
        table = cast("DataTable[Text]", self.query_one(DataTable))
        table.add_columns("", *(Text(_short(run.name, len(self._runs))) for run in self._runs))
        differences = difference_rows(self._runs)
        for row in [*outcome_rows(self._runs), *differences]:
            table.add_row(*(Text(cell) for cell in row))
        self._show_curves()

    def action_turn_loss(self) -> None:
        """Show the other loss."""
        self._held_out = not self._held_out
        self._show_curves()

    def action_log_axis(self) -> None:
        """Show the loss on the other kind of axis."""
        plot = self.query_one(LinePlot)
        plot.log_y = not plot.log_y

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss()

    def _show_curves(self) -> None:
        plot = self.query_one(LinePlot)
        plot.x_total = float(max((run.history.total_steps or 0 for run in self._runs), default=0))
        drawn = self._runs[0].history.objective if self._runs else ""
        for index, run in enumerate(self._runs, start=1):
            alike = run.history.objective == drawn
            curve = _held_out(run) if self._held_out else _smoothed(run)
            plot.replace(str(index), *curve if alike else ([], []))
        others = sum(run.history.objective != drawn for run in self._runs)
        what = "Held-out loss" if self._held_out else "Training loss (smoothed)"
        count = len(difference_rows(self._runs))
        differ = (
            f"{count} field{'s' * (count != 1)} of the recipes differ{'s' * (count == 1)}"
            if count
            else "no field of their recipes differs"
        )
        unlike = f" ({others} of another objective, whose loss is another quantity, not drawn)" if others else ""
        self.query_one("#compare-head", Static).update(f"{what} of {len(self._runs) - others} runs{unlike}; {differ}")

    @work(thread=True)
    def _read(self) -> None:
        self.post_message(self.Read([read_compared(paths) for paths in self._paths]))


def _held_out(run: Compared) -> tuple[list[int], list[float]]:
    return [event.step for event in run.history.evals], [event.loss for event in run.history.evals]


def _smoothed(run: Compared) -> tuple[list[int], list[float]]:
    train = run.history.train
    window = min(100, max(3, len(train.steps) / _STEPS_PER_LOOK_BACK))
    return list(train.steps), Smoother(1 - 1 / window).feed(train.losses)


def _short(name: str, runs: int) -> str:
    """Return the end of a name, made harmless. The end holds the time, which tells runs of one recipe apart."""
    name, room = plain(name, one_line=True), 60 // max(1, runs)
    return name if len(name) <= room else f"...{name[3 - room :]}"
