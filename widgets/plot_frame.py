"""From ranges to a frame with round ticks, and a plot as plain lines for a terminal without screens."""

import math
from collections.abc import Mapping, Sequence

from widgets.axis import StickyRange, log_ticks, nice_ticks, tick_labels
from widgets.columns import ColumnExtremes
from widgets.plot_canvas import Frame, Kind, Trace, draw

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
        x_range: First and last x.
        y_range: Lowest and highest y, both positive with `log_y`.
        x_label: Written after the last x tick.
        log_y: Show y on a logarithmic axis; the traces must then hold log10 of their values.
    """
    rows = max(1, (height - 2) // _ROWS_PER_TICK)
    values = log_ticks(*y_range, rows) if log_y else nice_ticks(*y_range, rows)
    positions = [math.log10(value) for value in values] if log_y else values
    names = [tick_labels([value])[0] for value in values] if log_y else tick_labels(values)
    y_ticks = tuple(zip(positions, names, strict=True))
    shown = (math.log10(y_range[0]), math.log10(y_range[1])) if log_y else y_range
    xs = nice_ticks(*x_range, max(1, width // _CELLS_PER_TICK))
    labels = tick_labels(xs)
    if x_label and labels:
        labels[-1] = f"{labels[-1]} {x_label}"
    return Frame(width, height, x_range, shown, tuple(zip(xs, labels, strict=True)), y_ticks)


def plain_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Kind]],
    *,
    width: int = 72,
    height: int = 16,
    x_label: str = "",
) -> list[str]:
    """Return a plot as lines of text without colours, the names of the curves first; empty without a finite point.

    Args:
        curves: For each name its xs, its ys and how it is drawn; non-finite ys are gaps.
        width: Cells across.
        height: Rows, the line of names included.
        x_label: Written after the last x tick.
    """
    xs = [x for curve_xs, _, _ in curves.values() for x in curve_xs if math.isfinite(x)]
    if not xs:
        return []
    x_range = (min(xs), max(xs)) if min(xs) < max(xs) else (xs[0], xs[0] + 1)
    kept = {}
    for name, (curve_xs, curve_ys, kind) in curves.items():
        kept[name] = ColumnExtremes(*x_range, max(1, width)), kind
        kept[name][0].add(curve_xs, curve_ys)
    spans = [span for columns, _ in kept.values() if (span := columns.y_span()) is not None]
    if not spans:
        return []
    y_range = StickyRange().cover(min(low for low, _ in spans), max(high for _, high in spans))
    frame = framed(width, height - 1, x_range, y_range, x_label=x_label)
    traces = [Trace(columns.segments(), 1, kind) for columns, kind in kept.values()]
    names = "   ".join(f"{'●' if kind == 'dots' else '─'} {name}" for name, (_, kind) in kept.items())
    return [names, *(row.text.rstrip() for row in draw(frame, traces))]
