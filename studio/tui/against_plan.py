"""The peak that was estimated at launch beside the one that was measured, as a gauge shows them. Knows no widget."""

import json
from dataclasses import replace
from typing import Any

from studio.runs.layout import RunPaths
from studio.tui.readable import to_gib
from widgets.gauge_picture import Part, Reading

_OUTSIDE_TENSORS = "context"
"""The one component that torch's counters do not see."""


def planned_reading(paths: RunPaths) -> Reading | None:
    """Return the estimated peak of live tensors by component, in GiB; None where `plan.json` does not tell."""
    try:
        plan = json.loads(paths.plan.read_bytes())
        named = [(str(name), _size(size)) for name, size in plan["components"].items() if name != _OUTSIDE_TENSORS]
        spread = plan["ranges"]["allocated"]
        low, high = _size(spread["low"]), _size(spread["high"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    parts = tuple(Part(name, to_gib(size)) for name, size in named if name.isidentifier() and name.isascii())
    return Reading(parts, low=to_gib(low), high=to_gib(high), verdict="predicted") if parts else None


def with_measured(planned: Reading, peak: float | None) -> Reading:
    """Return the reading with the highest measured peak of live tensors, bytes, and how the range did."""
    if peak is None or planned.low is None or planned.high is None:
        return planned
    measured = to_gib(peak)
    if measured > planned.high:
        return replace(planned, measured=measured, verdict=f"{_percent(measured, planned.total)} over", level="bad")
    if measured < planned.low:
        return replace(
            planned, measured=measured, verdict=f"{_percent(measured, planned.total)} under", level="doubtful"
        )
    return replace(planned, measured=measured, verdict="in the range", level="good")


def _size(value: Any) -> int:
    """Return a number of bytes.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"found {value!r}; wanted a number of bytes")
    return value


def _percent(measured: float, predicted: float) -> str:
    return f"{abs(measured / predicted - 1):.0%}" if predicted else "all"
