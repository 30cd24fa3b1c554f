"""The losses of a run as a plot in characters, fitted to the terminal."""

import math
import re
from collections.abc import Sequence

from studio.commands.terminal import as_ascii
from studio.runs.history import History

_ROWS = 16
_MARGIN = 10
_STEPS_BETWEEN_TICKS = (1, 2, 5)
"""Distances of ticks, each times a power of ten."""
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def loss_plot(history: History, *, width: int, rich: bool) -> str:
    """Return training and held-out loss over steps; empty where there is nothing to show.

    Args:
        history: The run.
        width: Columns.
        rich: Whether colours and braille may be used; else the plot is ASCII without escapes.
    """
    train = _finite(history.train.steps, history.train.losses)
    held_out = _finite([event.step for event in history.evals], [event.loss for event in history.evals])
    if len(train) + len(held_out) < 2:
        return ""
    import plotext  # noqa: PLC0415  50 ms that verbs without a plot do not pay

    plotext.clear_figure()
    plotext.theme("pro" if rich else "clear")
    plotext.plotsize(width, _ROWS)
    if train:
        xs, ys = zip(*thinned(train, max(1, width - _MARGIN)), strict=True)
        plotext.plot(list(xs), list(ys), label="training loss", marker="braille" if rich else "*")
    if held_out:
        xs, ys = zip(*thinned(held_out, max(1, width - _MARGIN)), strict=True)
        plotext.scatter(list(xs), list(ys), label="held-out loss", marker="●" if rich else "o")
    low = min(step for step, _ in train + held_out)
    high = max(step for step, _ in train + held_out)
    plotext.xticks(ticks(low, high, width // 14))
    text = str(plotext.build())
    plotext.clear_figure()
    return text if rich else as_ascii(_ESCAPES.sub("", text))


def thinned(points: Sequence[tuple[int, float]], columns: int) -> list[tuple[int, float]]:
    """Return at most two points per column, its lowest and its highest, so that no spike is lost."""
    if len(points) <= 2 * columns:
        return list(points)
    kept: list[tuple[int, float]] = []
    for column in range(columns):
        bucket = points[column * len(points) // columns : (column + 1) * len(points) // columns]
        ends = {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def ticks(low: int, high: int, most: int) -> list[int]:
    """Return round step numbers between low and high, at most about `most` of them."""
    span = max(1, high - low)
    unit = 10 ** max(0, math.floor(math.log10(span / max(1, most))))
    # The first tick is `low` rounded up to a multiple of the gap.
    gap = next((unit * times for times in _STEPS_BETWEEN_TICKS if span / (unit * times) <= most), unit * 10)
    return list(range(-(-low // gap) * gap, high + 1, gap)) or [low]


def _finite(steps: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """Return the finite points. The plotting library draws other values wrongly, so their points are left out."""
    return [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
