"""Speed and time of a recipe, as lines that people read."""

from studio.core.throughput import Duration, Speed
from studio.core.vram.setup import Setup
from studio.probe.pace import Pace

_HOUR_MINUTES = 60


def pace_lines(pace: Pace, setup: Setup) -> list[str]:
    """Return what is known of speed, time and the price of 4 bit; a line says so where nothing is."""
    if pace.speed is None:
        return [f"speed: not known; {pace.why_not}"]
    lines = [f"speed: about {rates(pace.speed)} tokens/s, full rows; from {pace.speed.basis}"]
    if pace.duration is not None and pace.tokens is not None:
        least, _, most = pace.tokens
        lines.append(
            f"time: {time_range(pace.duration)} for {pace.steps} steps of "
            f"{count(least)} to {count(most)} tokens in all, guessed from the text of the data; "
            "evaluations, samples and loading come on top"
        )
    if pace.slowdown is not None and setup.quantised:
        low, usual, high = pace.slowdown
        lines.append(f"4 bit: a step takes {usual:.2f} times as long as in 16 bit ({low:.2f} to {high:.2f})")
    return lines


def rates(speed: Speed) -> str:
    """Return a speed as `1 270 (730 to 2 230)`."""
    low, usual, high = (_rate(value) for value in (speed.low, speed.expected, speed.high))
    return f"{usual} ({low} to {high})"


def hours(value: float) -> str:
    """Return hours as a person says them: `4 min`, `2.5 h`, `40 h`."""
    minutes = value * _HOUR_MINUTES
    if minutes < 1:
        return "under a minute"
    if minutes < 2 * _HOUR_MINUTES:
        return f"{minutes:.0f} min"
    return f"{value:.1f} h" if value < 10 else f"{value:.0f} h"


def time_range(duration: Duration) -> str:
    """Return a duration as `40 min to 2.5 h`."""
    low, high = hours(duration.low), hours(duration.high)
    return low if low == high else f"{low} to {high}"


def count(tokens: float) -> str:
    """Return a number of tokens as `74 k`, `1.2 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"


def _rate(value: float) -> str:
    if value < 10:
        return f"{value:.1f}"
    digits = 10 ** max(0, len(str(int(value))) - 3)
    return f"{round(value / digits) * digits:,}".replace(",", " ")
