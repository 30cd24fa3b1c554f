"""The configure screen with two plots fed twice a second: more than any screen of ours shows at once."""

import math
import sys
from pathlib import Path

from textual.app import ComposeResult
from textual.containers import Vertical

from studio.commands.open_studio import first_recipe
from studio.tui.app import StudioApp, show
from studio.tui.panels.data_note import DataNote
from studio.tui.panels.field_help import FieldHelp
from studio.tui.panels.forecast import MemoryGauges
from studio.tui.panels.top_bar import TopBar
from studio.tui.screens.configure import ConfigureScreen
from widgets.line_plot import Curve, LinePlot

_HZ = 2.0
_STEPS_PER_LOOK = 5


class BusyConfigure(ConfigureScreen):
    """The configure screen, its forecast above two plots."""

    DEFAULT_CSS = """
    BusyConfigure LinePlot { height: 9; }
    BusyConfigure Forecast, BusyConfigure.-wide Forecast { height: 16; }
    BusyConfigure.-wide #work { layout: horizontal; }
    BusyConfigure.-wide #side { width: 1fr; }
    BusyConfigure.-wide DataNote { height: 1; border: none; }
    """

    def compose(self) -> ComposeResult:
        """As the original, with plots below the forecast."""
        yield TopBar("Configure", card=self._services.card)
        yield MemoryGauges(rows=True)
        with Vertical(id="work"):
            yield self._form
            with Vertical(id="side"):
                yield self.forecast
                for name in ("loss", "memory"):
                    yield LinePlot([Curve("a", "raw", "faint"), Curve("b", "mean")], title=name, id=f"plot-{name}")
                yield FieldHelp()
        yield DataNote(self.recipe, services=self._services)

    def on_mount(self) -> None:
        """Begin to feed."""
        super().on_mount()
        self._fed = 0
        for plot in self.query(LinePlot):
            plot.x_total = 2000.0
        self.set_interval(1 / _HZ, self._feed)

    def _feed(self) -> None:
        steps = range(self._fed, self._fed + _STEPS_PER_LOOK)
        self._fed += _STEPS_PER_LOOK
        for plot in self.query(LinePlot):
            values = [1 + 3 * math.exp(-step / 300) + 0.1 * math.sin(step) for step in steps]
            plot.extend("a", steps, values)
            plot.extend("b", steps, [1 + 3 * math.exp(-step / 300) for step in steps])


class BusyStudio(StudioApp):
    """The studio on the busy screen."""

    def __init__(self, root: Path) -> None:
        super().__init__(first_recipe(), runs_root=root)
        self._configure = BusyConfigure(first_recipe(), runs_root=root, services=self._services)


if __name__ == "__main__":
    show(BusyStudio(Path(sys.argv[1])))
