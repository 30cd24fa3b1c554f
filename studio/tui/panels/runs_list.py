"""The list of runs by group: what stands of each in two rows, which ones the filter lets through, which is chosen."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from studio.core.text import plain
from studio.runs.status import Status
from studio.runs.store import RunInfo
from studio.tui.readable import UNKNOWN, number

LONGEST = 72
"""Cells of a name that `new_run` makes, and some more; a longer one was made by hand."""
_LONGEST_WORD = 48
_LONGEST_NOTE = 32

GROUPS = {"train": "Runs", "merge": "Merges", "export": "Exports", "audit": "Audits", "measure": "Measurements"}
"""The kinds of job in the order of their groups, and what a group is called. Unknown kinds are among the runs."""

GLYPHS = {
    Status.starting: ("◌", "$text-success"),
    Status.queued: ("◷", "$text-warning"),
    Status.restarting: ("◌", "$text-warning"),
    Status.running: ("●", "$text-success"),
    Status.paused: ("‖", "$text-warning"),
    Status.stopping: ("●", "$text-warning"),
    Status.finished: ("✓", "$text-success"),
    Status.stopped: ("■", "$text-warning"),
    Status.failed: ("✗", "$text-error"),
    Status.crashed: ("✗", "$text-error"),
}
"""The mark of each status and its colour; the word stands beside it."""

_GIVES_WAY = ("started", "note", "spark", "loss", "made")
"""Pieces of the second row that are left out where there is no room, in this order."""
_INDENT = 2


@dataclass(frozen=True, slots=True)
class Row:
    """What stands of one run, as words; `UNKNOWN` or nothing where a run has no such thing."""

    info: RunInfo
    marked: bool
    spark: str
    name: str
    step: str
    loss: str
    held_out: str
    note: str
    started: str
    method: str
    model: str


def group_of(info: RunInfo) -> str:
    """Return the kind of job whose group a run is listed in."""
    return info.job if info.job in GROUPS else "train"


def matches(info: RunInfo, words: Sequence[str]) -> bool:
    """Return whether every word, in lower case, is found in a run."""
    searched = " ".join(
        str(word) for word in (info.status, info.name, info.job, info.method, info.model, info.note)
    ).lower()
    return all(word in searched for word in words)


class RunsList(OptionList):
    """Two rows for each run: mark, name, method and model; below them status, step, losses, note and time."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select", "Open")]

    DEFAULT_CSS = """
    RunsList {
        height: 1fr;
        border: none;
        padding: 0;
        background: $background;
        scrollbar-size-vertical: 1;
        &:focus { border: none; background-tint: $background 0%; }
    }
    """

    def __init__(self) -> None:
        """Start empty."""
        super().__init__(markup=False)
        self._rows: dict[str, Row] = {}
        self._drawn: list[Content] = []

    def on_resize(self, event: events.Resize) -> None:
        """Lay the rows out for the new width."""
        self._draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer to open a run only where there is one."""
        return action != "select" or self.chosen is not None

    @property
    def rows(self) -> list[Row]:
        """What is listed."""
        return list(self._rows.values())

    @property
    def chosen(self) -> RunInfo | None:
        """The run under the cursor."""
        place = self.highlighted
        return self.rows[place].info if place is not None and place < len(self._rows) else None

    def show(self, infos: Iterable[RunInfo], *, marked: AbstractSet[str], sparks: Mapping[str, str]) -> None:
        """Show runs; repaints only rows that changed, and keeps the cursor on its run."""
        before, chosen = list(self._rows), self.chosen
        self._rows = {info.name: _row(info, info.name in marked, sparks.get(info.name, "")) for info in infos}
        names = list(self._rows)
        if names != before:
            self.clear_options()
            self._drawn = []
        self._draw()
        if names != before and names:
            self.highlighted = names.index(chosen.name) if chosen is not None and chosen.name in names else 0

    def _draw(self) -> None:
        width = self.scrollable_content_region.width
        if not width:
            return
        lines = laid_out(self.rows, width)
        if len(self._drawn) != len(lines):
            self.add_options([Option(line) for line in lines])
        else:
            for place, (line, old) in enumerate(zip(lines, self._drawn, strict=True)):
                if line != old:
                    self.replace_option_prompt_at_index(place, line)
        self._drawn = lines


def laid_out(rows: Sequence[Row], width: int) -> list[Content]:
    """Return the two lines of each run, what is alike below each other. A name is never cut if `width` can hold it."""
    seconds = [_pieces(row) for row in rows]
    wide = {key: max(cell_len(pieces[key]) for pieces in seconds) for key in (seconds[0] if seconds else ())}
    what = (
        max((cell_len(row.method) for row in rows), default=0),
        max((cell_len(row.model) for row in rows), default=0),
    )
    return [_two_lines(row, pieces, wide, what, width) for row, pieces in zip(rows, seconds, strict=True)]


def _two_lines(row: Row, pieces: dict[str, str], wide: dict[str, int], what: tuple[int, int], width: int) -> Content:
    glyph, colour = GLYPHS[row.info.status]
    name = f"{'* ' if row.marked else ''}{row.name}"
    of_it = f"{_padded(row.method, what[0])}  {_padded(row.model, what[1])}".rstrip()
    room = width - _INDENT - cell_len(name) - 2
    begins = width - sum(what) - 2
    above = begins - _INDENT - cell_len(name) >= 2
    if not above and cell_len(of_it) <= room:  # not in its column, but beside the name
        above, begins = True, width - cell_len(of_it)
    gap = " " * (begins - _INDENT - cell_len(name)) if above else ""
    head: list[str | tuple[str, str]] = [(f"{glyph} ", f"{colour} bold"), (name, "bold"), gap]
    head.append(of_it if above else "")
    shown = {key: _padded(text, wide[key]) for key, text in pieces.items() if wide[key]}
    if not above:
        shown["what"] = f"{row.method}  {row.model}"
    for key in _GIVES_WAY:
        if _INDENT + sum(cell_len(text) + 2 for text in shown.values()) - 2 <= width:
            break
        shown.pop(key, None)
    else:
        if "held_out" in shown:
            shown["held_out"] = f"held-out {row.held_out}"
    styles = {"status": colour, "warned": "$text-warning", "note": "$text-accent", "started": "dim"}
    tail: list[str | tuple[str, str]] = []
    for key, text in shown.items():
        tail += [" " * (_INDENT if not tail else 1 if key == "spark" else 2), (text, styles.get(key, ""))]
    lines = (Content.assemble(*parts).truncate(width, ellipsis=True) for parts in (head, tail))
    return Content("\n").join(lines)


def _padded(text: str, cells: int) -> str:
    return text + " " * (cells - cell_len(text))


def _row(info: RunInfo, marked: bool, spark: str) -> Row:
    step = (
        UNKNOWN if info.last_step is None else f"{info.last_step}/{info.total}" if info.total else str(info.last_step)
    )
    method = plain(info.method or info.job or UNKNOWN, one_line=True, limit=_LONGEST_WORD)
    rank = f" r{info.rank}" if info.rank else ""
    # Of an id of the hub, or a path, the last part; the whole is shown for the run under the cursor.
    model = (info.model or UNKNOWN).rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    return Row(
        info,
        marked,
        spark,
        name=plain(info.name, one_line=True, limit=LONGEST),
        step=step,
        loss=_loss(info.last_loss),
        held_out=_loss(info.eval_loss),
        note=plain(info.note, one_line=True, limit=_LONGEST_NOTE),
        started=_when(info.started_at) if info.started_at else UNKNOWN,
        method=f"{method}{rank}",
        model=plain(model, one_line=True, limit=_LONGEST_WORD),
    )


def _pieces(row: Row) -> dict[str, str]:
    """Return what stands in a run's second row."""
    info, before = row.info, row.info.first_eval_loss
    held_out = row.held_out
    if before is not None and info.eval_loss is not None and before != info.eval_loss:
        held_out = f"{_loss(before)} → {held_out}"
    warned = f"! {len(info.warnings)} warning{'s' * (len(info.warnings) != 1)}" if info.warnings else ""
    trained = group_of(info) == "train"
    return {
        "status": str(info.status),
        "step": row.step if trained and row.step != UNKNOWN else "",
        "loss": f"loss {row.loss}" if row.loss != UNKNOWN else "",
        "spark": row.spark,
        "held_out": f"held-out {held_out}" if held_out != UNKNOWN else "",
        "warned": warned,
        "started": row.started,
        "note": f"“{row.note}”" if row.note else "",
        "made": plain(info.made or "", one_line=True, limit=_LONGEST_WORD) if not trained else "",
    }


def _when(at: float) -> str:
    """Return the time of day for today, else the day."""
    then = time.localtime(at)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%Y-%m-%d", then)


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else number(value) if math.isfinite(value) else str(value)


def group_name(key: str, found: list[RunInfo], infos: list[RunInfo]) -> str:
    """Return a group's name with how many runs it has, and a mark where one of them is alive."""
    fewer = f"{len(found)}/" if len(found) != len(infos) else ""
    return f"{GROUPS[key]} {fewer}{len(infos)}{' ●' if any(info.status.live for info in infos) else ''}"
