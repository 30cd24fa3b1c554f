"""Speed and time of a run as lines for a person."""

from collections.abc import Iterator
from pathlib import Path

from studio.core.text import plain
from studio.core.throughput import Duration, Speed
from studio.core.vram.setup import Setup
from studio.probe.pace import Pace

_HOUR_MINUTES = 60


def pace_lines(pace: Pace, setup: Setup) -> list[str]:
    """Return lines on a mixture's shares, on speed, on time and on how much 4 bits slow a step.

    Where no speed is known, one line says why.
    """
    lines = [f"mixture: {'; '.join(_shares(pace))}, guessed from the beginnings of the files"] if pace.sources else []
    run = ""
    if pace.tokens is not None:
        least, _, most = pace.tokens
        run = (
            f"{pace.steps} steps of {_count(least)} to {_count(most)} tokens in all, guessed from the text of the data"
        )
    if pace.speed is None:
        return [*lines, *([f"data: {run}"] if run else []), f"speed: not known; {pace.why_not}"]
    lines += [f"speed: about {_rates(pace.speed)} tokens/s, full rows; from {pace.speed.basis}"]
    if pace.speed.launch_bound:
        lines.append("launch-bound: the card waits for the host to launch kernels; more rows at once cost little time")
    if pace.duration is not None:
        lines.append(f"time: {_time_range(pace.duration)} for {run}; evaluations, samples and loading come on top")
    if pace.slowdown is not None and setup.quantised:
        low, usual, high = pace.slowdown
        lines.append(f"4 bit: a step takes {usual:.2f} times as long as in 16 bit ({low:.2f} to {high:.2f})")
    if pace.copying is not None:
        low, usual, high = pace.copying
        price = f"{usual:.2f} times as long as with the base on the card ({low:.2f} to {high:.2f})"
        lines.append(f"streamed: a step takes {price}; more tokens a micro-batch hide more of the copies")
    return lines


def _shares(pace: Pace) -> Iterator[str]:
    rows = max(1, sum(drawn for _, drawn, _ in pace.sources))
    tokens = max(1.0, sum(of_them for *_, of_them in pace.sources))
    for path, drawn, of_them in pace.sources:
        name = plain(Path(path).name, one_line=True, limit=40)
        yield f"{name} {drawn:,} rows ({drawn / rows:.0%}, about {of_them / tokens:.0%} of the tokens)"


def _rates(speed: Speed) -> str:
    """Return a speed as `1 270 (730 to 2 230)`."""
    low, usual, high = (_rate(value) for value in (speed.low, speed.expected, speed.high))
    return f"{usual} ({low} to {high})"


def _hours(value: float) -> str:
    """Return hours as a person says them: `4 min`, `2.5 h`, `40 h`."""
    minutes = value * _HOUR_MINUTES
    if minutes < 1:
        return "under a minute"
    if minutes < 2 * _HOUR_MINUTES:
        return f"{minutes:.0f} min"
    return f"{value:.1f} h" if value < 10 else f"{value:.0f} h"


def _time_range(duration: Duration) -> str:
    """Return a duration as `40 min to 2.5 h`."""
    low, high = _hours(duration.low), _hours(duration.high)
    return low if low == high else f"{low} to {high}"


def _count(tokens: float) -> str:
    """Return a number of tokens as `74 k`, `1.2 M`."""
    for unit, many in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= many:
            return f"{tokens / many:.3g} {unit}"
    return f"{tokens:.0f}"


def _rate(value: float) -> str:
    """Return a speed with three significant digits and a space between its thousands; below 10 with one decimal."""
    if value < 10:
        return f"{value:.1f}"
    digits = 10 ** max(0, len(str(int(value))) - 3)
    return f"{round(value / digits) * digits:,}".replace(",", " ")
