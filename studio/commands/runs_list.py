"""`lora-studio runs list`: all runs, from the ends of their logs."""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from studio.commands.options import root_of
from studio.commands.terminal import DONE, number, say, table, width_of_terminal, write_json
from studio.core.text import plain
from studio.runs.status import Status
from studio.runs.store import RunInfo, list_runs

_COLUMNS = ("run", "status", "method", "model", "step", "loss", "held-out", "started", "note")
_GIVES_WAY = ("model", "method", "started", "note", "held-out", "loss", "step")
"""Columns that are left out in a narrow terminal, in this order."""
_LEAST_CELLS = {"run": 24, "note": 12, "model": 9}
"""Cells to which these columns can be cut, in this order. The beginning of a run's name is enough to name the run."""


def list_all(args: argparse.Namespace) -> int:
    """List all runs, newest first; in a terminal never wider than the terminal."""
    infos = list_runs(root_of(args))
    if args.json:
        write_json([_listed(info) for info in infos])
    elif not infos:
        say(f"no runs in {plain(str(root_of(args)), one_line=True)}")
    else:
        text = table([list(_COLUMNS), *map(_row, infos)])
        if sys.stdout.isatty() and max(map(len, text.splitlines())) > width_of_terminal():
            text = fitted([_row(info, day_or_time=True) for info in infos], width_of_terminal())
        say(text)
    return DONE


def fitted(rows: Sequence[Sequence[str]], width: int) -> str:
    """Return rows as a table that is at most so many cells wide.

    Long words are cut. Where that is not enough, columns are left out, and a line below the table names them.
    """
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415  a list that is piped does without

    safe = [[plain(cell, one_line=True) for cell in row] for row in rows]
    shown = dict(zip(_COLUMNS, zip(_COLUMNS, *safe, strict=True), strict=True))
    if not any(shown["note"][1:]):
        del shown["note"]
    widths = {name: max(map(cell_len, cells)) for name, cells in shown.items()}
    missing = []
    for name in [name for name in _GIVES_WAY if name in widths]:
        if _line_cells(min(wide, _LEAST_CELLS.get(name, wide)) for name, wide in widths.items()) <= width:
            break
        del widths[name]
        missing.append(name)
    for name in [name for name in _LEAST_CELLS if name in widths]:
        too_much = max(0, _line_cells(widths.values()) - width)
        widths[name] = max(widths[name] - too_much, min(widths[name], _LEAST_CELLS[name]))
    lines = []
    for row in range(len(rows) + 1):
        texts = [(shown[name][row], wide) for name, wide in widths.items()]
        cut = [text if cell_len(text) <= wide else f"{set_cell_size(text, wide - 1)}…" for text, wide in texts]
        lines.append("  ".join(set_cell_size(text, wide) for text, (_, wide) in zip(cut, texts, strict=True)).rstrip())
    told = f"not shown: {', '.join(missing)}; a pipe or --json shows all"
    return "\n".join([*lines, *([told] if missing else [])])


def _line_cells(widths: Iterable[int]) -> int:
    """Return the cells of a line whose columns stand two cells apart."""
    return sum(wide + 2 for wide in widths) - 2


def _listed(info: RunInfo) -> dict[str, Any]:
    return {
        "run": info.name,
        "path": str(info.paths.root),
        "status": str(info.status),
        "failure": info.failure,
        "job": info.job,
        "method": info.method,
        "model": info.model,
        "step": info.last_step,
        "total_steps": info.total,
        "loss": _finite(info.last_loss),
        "eval_loss": _finite(info.eval_loss),
        "started_at": info.started_at,
        "note": info.note,
    }


def _row(info: RunInfo, *, day_or_time: bool = False) -> list[str]:
    """Return a row; `day_or_time` gives the time of today's runs and only the day of all others."""
    began = None if info.started_at is None else time.localtime(info.started_at)
    short = "%H:%M" if began and began[:3] == time.localtime()[:3] else "%Y-%m-%d"
    started = "" if began is None else time.strftime(short if day_or_time else "%Y-%m-%d %H:%M", began)
    done = f"{info.last_step or 0}/{info.total}" if info.total else str(info.last_step or "")
    crashed = info.status is Status.crashed
    return [
        info.name,
        f"{info.status}{' !' if crashed else ''}",
        info.method or info.job or "",
        plain(info.model or "", one_line=True, limit=40),
        done,
        number(info.last_loss),
        number(info.eval_loss),
        started,
        plain(info.note, one_line=True, limit=40),
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
