"""The peak that was estimated at launch beside the one that was measured, in one row."""

from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.tui.against_plan import planned_reading, with_measured
from widgets.gauge import Gauge, Reading


class PeakGauge(Gauge):
    """Appears once the run has told its device. The estimate is one of a card, so a CPU run has none."""

    DEFAULT_CSS = """
    PeakGauge { height: 1; padding: 0 1; display: none; }
    PeakGauge.-shown { display: block; }
    """

    def __init__(self, paths: RunPaths) -> None:
        """Start hidden."""
        super().__init__(unit="GiB", label="peak")
        self._paths = paths
        self._planned: Reading | None = None

    def show(self, history: History, highest_bytes: float | None) -> bool:
        """Show the estimate and the highest measured peak of live tensors; return whether this is the first time."""
        if history.planned is None or history.planned.device == "cpu":
            return False
        first = self._planned is None
        self._planned = self._planned or planned_reading(self._paths) or Reading()
        if self._planned.parts:
            self.reading = with_measured(self._planned, highest_bytes)
            self.set_class(True, "-shown")
        return first
