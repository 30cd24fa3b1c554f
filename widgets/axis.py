"""Axis arithmetic: round ticks, their labels, and a range that rarely moves. Knows no widget and no plot library."""

import math
from collections.abc import Sequence

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHRINK_BELOW = 0.35
"""The axis shrinks only when the data fill less than this share of it: each change of the axis redraws the plot."""

_LEAST_SPAN = 1e-9
"""A span below this share of the values' own size is taken for rounding noise."""
_LEAST_SIZE = 1e-280
"""Below this, steps between ticks would leave the range of floats."""


def nice_step(span: float, count: int) -> float:
    """Return the smallest of 1, 2, 2.5 and 5 times a power of ten that cuts `span` into at most `count` parts.

    Raises:
        ValueError: The span is not a positive finite number, or the count is below one.
    """
    if not math.isfinite(span) or span <= 0 or count < 1:
        raise ValueError(f"found a span of {span} in {count} parts; wanted a positive finite span and a part")
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next((step * power for step in _STEPS if step * power >= rough * (1 - 1e-9)), 10 * power)


def nice_ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round values from `low` to `high`, both included, in at most `count` steps; only whole ones if `whole`."""
    if not low < high:
        return [low]
    step = nice_step(high - low, max(1, count))
    # A step of 2.5 or 0.5 is no step between counts.
    if whole and step != round(step):
        step = math.ceil(step) if step < 2 else 5.0
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Return the powers of ten between two positive values; with few decades also 2 and 5 times them.

    Where even these are fewer than two, they are round values as for a linear axis.
    """
    if not 0 < low < high:
        return [low]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if 2 <= len(inside) <= count + 1:
            return inside
    if len(inside) > count:
        return inside[:: math.ceil(len(inside) / max(1, count))]
    return nice_ticks(low, high, count)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return one label for each tick, with as many decimals as the ticks have; thousands are `k`, millions `M` ..."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if 0 < largest < 1e-3:
        return [f"{tick:.3g}" for tick in ticks]
    scale, suffix = next(((size, name) for size, name in _SUFFIXES if largest >= 10 * size), (1.0, ""))
    scaled = [tick / scale for tick in ticks]
    decimals = max((_decimals(value) for value in scaled), default=0)
    return [f"{value:.{decimals}f}{suffix if value else ''}" for value in scaled]


def _decimals(value: float) -> int:
    text = f"{value:.6f}".rstrip("0")
    return len(text.partition(".")[2])


class StickyRange:
    """A y range with round ends that covers its data and does not change while they move inside it."""

    def __init__(self, *, from_zero: bool = False, margin: float = 0.02) -> None:
        """Keep zero inside the range when `from_zero`; leave at least `margin` of the data's span free at both ends."""
        self._from_zero = from_zero
        self._margin = margin
        self._range: tuple[float, float] | None = None

    def forget(self) -> None:
        """Drop the range, so that the next call chooses a new one."""
        self._range = None

    def cover(self, low: float, high: float) -> tuple[float, float]:
        """Return a range that holds `low` to `high`: the last one, unless the data leave it or fill too little of it.

        Raises:
            ValueError: A value is not finite, or low is above high.
        """
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"found {low} to {high}; wanted two finite values, the lower first")
        low = min(low, 0.0) if self._from_zero else low
        if self._range is not None:
            bottom, top = self._range
            fills = (high - low) / (top - bottom)
            if bottom <= low and high <= top and fills >= _SHRINK_BELOW:
                return self._range
            if bottom <= low and high <= top and high == low:
                return self._range
        self._range = _rounded_out(low, high, self._margin)
        return self._range


def _rounded_out(low: float, high: float, margin: float) -> tuple[float, float]:
    span = high - low
    size = max(abs(low), abs(high))
    if span <= _LEAST_SPAN * size or size < _LEAST_SIZE:  # a flat curve: room around it
        span, margin = size * 0.1 if size >= _LEAST_SIZE else 1.0, 0.5
    step = nice_step(span, 4)
    bottom = math.floor((low - margin * span) / step + 1e-9) * step
    top = math.ceil((high + margin * span) / step - 1e-9) * step
    return (0.0 if low == 0.0 else bottom), top
