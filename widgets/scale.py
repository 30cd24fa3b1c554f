"""The values that a slider can take: stops between two ends. Knows no widget."""

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """The stops of a slider in rising order, and the ends that a typed value may reach.

    A value between two stops is allowed; the next turn goes to the neighbouring stop.

    Attributes:
        stops: Rising values, at least one.
        low: Smallest value that may be typed.
        high: Largest value that may be typed.
    """

    stops: tuple[float, ...]
    low: float
    high: float

    def turned(self, value: float, stops: int) -> float:
        """Return the value so many stops further up, or down if negative, but not beyond the ends."""
        if stops > 0:
            index = bisect.bisect_right(self.stops, value) + stops - 1
        else:
            index = bisect.bisect_left(self.stops, value) + stops
        if index < 0 and value < self.stops[0]:
            return value
        if index >= len(self.stops) and value > self.stops[-1]:
            return value
        return self.stops[min(max(index, 0), len(self.stops) - 1)]

    def fraction(self, value: float) -> float:
        """Return the place of a value, 0 to 1; every two neighbouring stops are equally far apart."""
        if len(self.stops) == 1 or value <= self.stops[0]:
            return 0.0
        if value >= self.stops[-1]:
            return 1.0
        index = bisect.bisect_right(self.stops, value) - 1
        below, above = self.stops[index], self.stops[index + 1]
        return (index + (value - below) / (above - below)) / (len(self.stops) - 1)

    def nearest(self, fraction: float) -> float:
        """Return the stop nearest to a place from 0 to 1."""
        index = round(min(max(fraction, 0.0), 1.0) * (len(self.stops) - 1))
        return self.stops[index]

    @property
    def coarse(self) -> int:
        """How many stops a coarse turn takes: a fifth of them."""
        return max(2, len(self.stops) // 5)


def stops_scale(stops: Iterable[float], low: float | None = None, high: float | None = None) -> Scale:
    """Return a scale with exactly these stops; typing reaches from `low` to `high`, by default the outer stops.

    Raises:
        ValueError: No stops, or they do not rise, or lie outside the ends.
    """
    values = tuple(stops)
    if not values or any(not a < b for a, b in itertools.pairwise(values)):
        raise ValueError(f"found stops {values}; wanted at least one, each above the one before")
    bottom, top = values[0] if low is None else low, values[-1] if high is None else high
    if bottom > values[0] or top < values[-1]:
        raise ValueError(f"found ends {bottom} to {top}; wanted them to hold the stops {values[0]} to {values[-1]}")
    return Scale(values, bottom, top)
