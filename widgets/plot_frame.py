"""From ranges to a frame with round ticks. Knows no widget."""

import math

from widgets.axis import log_ticks, nice_ticks, tick_labels
from widgets.plot_canvas import Frame

_ROWS_PER_TICK = 3
_CELLS_PER_TICK = 14


def framed(
    width: int,
    height: int,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    *,
    x_label: str = "",
    log_y: bool = False,
) -> Frame:
    """Return a frame with round ticks; with `log_y` its y range and tick positions are powers of ten (exponents).

    Args:
        width: Cells across, tick labels and axis included.
        height: Rows, tick labels and axis included.
        x_range: First and last x; x counts something, so that its ticks are whole.
        y_range: Lowest and highest y, both positive with `log_y`.
        x_label: Written after the last x tick.
        log_y: Show y on a logarithmic axis; the traces must then hold log10 of their values.
    """
    rows = max(2, (height - 2) // _ROWS_PER_TICK)
    values = log_ticks(*y_range, rows) if log_y else nice_ticks(*y_range, rows)
    positions = [math.log10(value) for value in values] if log_y else values
    names = [tick_labels([value])[0] for value in values] if log_y else tick_labels(values)
    y_ticks = tuple(zip(positions, names, strict=True))
    shown = (math.log10(y_range[0]), math.log10(y_range[1])) if log_y else y_range
    xs = nice_ticks(*x_range, max(1, width // _CELLS_PER_TICK), whole=True)
    labels = tick_labels(xs)
    if x_label and labels:
        labels[-1] = f"{labels[-1]} {x_label}"
    return Frame(width, height, x_range, shown, tuple(zip(xs, labels, strict=True)), y_ticks)
