"""The table of faults: a row for each, how it goes from a test to the end of a test run, and how it is printed."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

PROPERTY = "fault"
SLOW_SECONDS = 5.0
"""The truth must be shown within this time."""


@dataclass(slots=True)
class Fault:
    """A row of the table.

    Attributes:
        name: What happened to the run.
        made: How it was made.
        count: How many faults it stands for.
        told: What the user was told.
        shown_seconds: How long until that was shown, at the longest; None where nothing had to be shown.
        ended: How it ended; empty where the test failed before it knew.
        others: How many files of others were found as they had been.
        not_yet: What is not as it should be; empty where all is.
    """

    name: str
    made: str
    count: int = 1
    told: str = ""
    shown_seconds: float | None = None
    ended: str = ""
    others: int = 0
    not_yet: str = ""

    def property(self) -> tuple[str, dict[str, Any]]:
        """Return the row as pytest carries it from the process that ran the test."""
        return (PROPERTY, asdict(self))


def rows_of(properties: Iterable[tuple[str, Any]]) -> list[Fault]:
    """Return the rows among what a test has told of itself."""
    return [Fault(**value) for name, value in properties if name == PROPERTY and isinstance(value, Mapping)]


def lines_of(rows: Iterable[Fault]) -> list[str]:
    """Return the table in Markdown, and what it sums up to."""
    rows = list(rows)
    lines = [
        "| fault | made | told | shown in s | ended | others' files kept | not yet |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.name):
        shown = "" if row.shown_seconds is None else f"{row.shown_seconds:.2f}"
        cells = (row.name, row.made, row.told, shown, row.ended or "FAILED", str(row.others), row.not_yet)
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |")
    late = [row.name for row in rows if (row.shown_seconds or 0.0) > SLOW_SECONDS]
    lines.append("")
    lines.append(
        f"{sum(row.count for row in rows)} faults in {len(rows)} rows; {sum(not row.ended for row in rows)} failed, "
        f"{sum(bool(row.not_yet) for row in rows)} not yet as they should be; the truth shown after more than "
        f"{SLOW_SECONDS:g} s: {', '.join(late) or 'none'}"
    )
    return lines
