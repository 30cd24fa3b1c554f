"""Numbers as a person reads them in a header: short, with their unit, a dash where nothing is known."""

import math
from collections.abc import Sequence
from itertools import pairwise

from studio.core.text import duration_text

UNKNOWN = "-"
_GIB = 2**30
_LEVELS = "▁▂▃▄▅▆▇█"


def duration(seconds: float | None) -> str:
    """Return seconds as `42 s`, `3 min 05 s`, `2 h 07 min` or `3 d 4 h`."""
    return UNKNOWN if seconds is None or not math.isfinite(seconds) else duration_text(seconds)


def age(seconds: float) -> str:
    """Return how long ago something was, in its largest unit: `just now`, `12 min ago`, `3 h ago`, `5 days ago`."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def gib(size_bytes: float | None) -> str:
    """Return bytes as GiB with one decimal, without the unit."""
    return UNKNOWN if size_bytes is None or not math.isfinite(size_bytes) else f"{size_bytes / _GIB:.1f}"


def to_gib(size_bytes: float) -> float:
    """Return bytes in GiB; NaN stays NaN."""
    return size_bytes / _GIB


def number(value: float | None, digits: int = 4) -> str:
    """Return a measured number with that many significant digits; infinity and NaN are shown as `inf` and `nan`."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    # `#` keeps zeros at the end: a loss of 1.5 is shown as 1.500.
    text = f"{value:.{digits}g}" if value and abs(value) < 1e-3 else f"{value:#.{digits}g}".rstrip(".")
    return _short_exponent(text)


def setting(value: float) -> str:
    """Return a chosen number exactly as one would type it: 16, 0.03, 2e-4."""
    # 0.002 stays as it is; 0.0002 is shown as 2e-4.
    if value and abs(value) < 1e-2 and value != round(value, 3):
        return _short_exponent(f"{value:.6e}", strip=True)
    return f"{value:.10g}"


def count(value: float | None) -> str:
    """Return a whole number with a space between its thousands: 1 204."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{round(value):,}".replace(",", " ")


def spark(values: Sequence[float], cells: int = 8) -> str:
    """Return a curve in one row of at most so many cells: each is the mean of its share of the values.

    Values that are not finite are passed over. Fewer than two make no curve.
    """
    known = [value for value in values if math.isfinite(value)]
    cells = min(cells, len(known))
    if cells < 2:
        return ""
    ends = [round(place * len(known) / cells) for place in range(cells + 1)]
    means = [sum(known[begin:end]) / (end - begin) for begin, end in pairwise(ends)]
    low, span = min(means), max(means) - min(means)
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[round((mean - low) / span * top) if span > 0 else top // 2] for mean in means)


def _short_exponent(text: str, *, strip: bool = False) -> str:
    """Return a number such as `2.00e-04` as `2.00e-4`; with `strip` also without zeros at the end: `2e-4`."""
    mantissa, e, exponent = text.partition("e")
    if not e:
        return text
    return f"{mantissa.rstrip('0').rstrip('.') if strip else mantissa}e{int(exponent)}"
