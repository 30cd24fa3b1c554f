"""One audit from its request to its report in the folder of its run: JSON, Markdown and pictures."""

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from studio.core.audit_text import markdown_of
from studio.core.errors import BadInput
from studio.core.events import Finished, Saved, Started, Warned
from studio.core.text import plain
from studio.jobs.audit.lanes import train_lanes
from studio.jobs.base.failures import Cancelled
from studio.probe.device import other_card_note
from studio.runs.atomic import write_whole
from studio.runs.layout import RunPaths
from studio.runs.requests import WHAT, AuditRequest
from studio.runs.worker import Worker

Loss = tuple[str, float, float | None, float | None]
"""Name, value, low and high end."""

_ROW, _LEFT, _WIDTH, _RIGHT = 24, 210, 420, 90
_TEXT = 'font-family="sans-serif" font-size="12" fill="#333"'
_LINE, _DOT, _BAR = "#8a8a8a", "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito's palette, which any kind of colour vision can tell apart."""
_MOST_BARS = 30


def audit_run(worker: Worker, request: AuditRequest) -> None:
    """Measure as asked and write `report.json` and `report.md`.

    Raises:
        BadInput: Something that the request names cannot be used.
        JobFailed: The model cannot be measured.
    """
    worker.emit(Started, job="audit", method=request.what, model=request.model or None)
    if request.run and (note := other_card_note(RunPaths(Path(request.run)))):
        worker.emit(Warned, topic="card", message=note)
    try:
        report = _audited(worker, request)
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
        return
    write_report(worker, report)
    shutil.rmtree(worker.paths.audit_parts, ignore_errors=True)
    worker.emit(Finished, outcome="done", result={"report": worker.paths.report.name, "what": request.what})


def _audited(worker: Worker, request: AuditRequest) -> dict[str, Any]:
    """Return the report of one kind of audit.

    torch and modules that import it are imported only when they are needed: they take 0.4 GB of memory, which a race
    does not need while its lanes train.
    """
    match request.what:
        case "base":
            from studio.jobs.audit.base_audit import audit_base  # noqa: PLC0415

            return audit_base(worker, request)
        case "run":
            from studio.jobs.audit.run_audit import audit_adapter  # noqa: PLC0415

            return audit_adapter(worker, request)
        case "race":
            began = time.perf_counter()
            lanes = train_lanes(worker, request)
            from studio.jobs.audit.race import audit_race  # noqa: PLC0415

            return audit_race(worker, request, lanes, began)
    raise BadInput(f"an audit of the kind {request.what!r} is not known here; wanted one of {', '.join(WHAT)}.")


def write_report(worker: Worker, report: dict[str, Any]) -> None:
    """Write `report.json`, `report.md` and the pictures.

    Raises:
        OSError: The disk refuses.
    """
    root = Path(worker.paths.root)
    pictures = []
    for name, what, svg in _pictures(report):
        write_whole(root / name, svg)
        pictures.append((what, name))
    markdown = markdown_of(report, pictures)
    write_whole(worker.paths.report_text, markdown)
    write_whole(worker.paths.report, json.dumps(report, indent=1, allow_nan=False))
    if path := report.get("run_path"):
        # A model card quotes it under a heading of its own: headings go one level down, the user's data stay out.
        beside = {**report, "markdown": re.sub("^#", "##", markdown_of(report, texts=False), flags=re.MULTILINE)}
        write_whole(RunPaths(Path(path)).audit, json.dumps(beside, allow_nan=False))
    for file in (worker.paths.report, worker.paths.report_text):
        worker.emit(Saved, what="report", path=file.name)


def _pictures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return for each picture its file name, what it shows, and the SVG text."""
    rows = report["lanes" if report["what"] == "race" else "variants"]
    losses = [
        (row["name"], *(row["task"]["loss"][key] for key in ("value", "low", "high"))) for row in rows if row["task"]
    ]
    what = "Loss" if report["what"] == "base" else "Held-out loss"
    made = [("losses.svg", f"{what} with 95 % intervals", losses_svg(f"{what}, nats per token", losses))]
    blocks = report.get("blocks") or []
    if report["what"] == "base":
        bars = [(block["name"], block["own_effect"] or 0.0) for block in blocks[:_MOST_BARS]]
        title = f"Effect of {report['asked']} in one block alone on the hidden state"
        made.append(("blocks.svg", title, bars_svg(title, bars)))
    elif blocks:
        bars = [(block["name"], block["ratio"] or 0.0) for block in blocks[:_MOST_BARS]]
        title = "Rounding error over adapter, by block"
        made.append(("blocks.svg", title, bars_svg(title, bars, ".1f")))
    return made


def losses_svg(title: str, losses: Sequence[Loss]) -> str:
    """Return a picture of losses, each with its interval, as SVG text."""
    ends = [end for _, value, low, high in losses for end in (value, low, high) if end is not None]
    first, last = min(ends), max(ends)
    span = (last - first) or 1.0

    def place(value: float) -> float:
        return _LEFT + 10 + (value - first) / span * (_WIDTH - 20)

    marks = []
    for row, (name, value, low, high) in enumerate(losses):
        y = 44 + row * _ROW
        marks.append(_label(name, y))
        if low is not None and high is not None:
            ends_of = f'x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}"'
            marks.append(f'<line {ends_of} stroke="{_LINE}" stroke-width="4" stroke-linecap="round"/>')
        marks.append(f'<circle cx="{place(value):.1f}" cy="{y}" r="5" fill="{_DOT}"/>')
        marks.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 4}" {_TEXT}>{value:.4f}</text>')
    return _picture(title, len(losses), marks)


def bars_svg(title: str, bars: Sequence[tuple[str, float]], form: str = ".2%") -> str:
    """Return a picture of bars that begin at zero, as SVG text; negative values have no length."""
    longest = max((value for _, value in bars), default=0.0) or 1.0
    marks = []
    for row, (name, value) in enumerate(bars):
        y = 44 + row * _ROW
        width = max(0.0, value) / longest * _WIDTH
        marks.append(_label(name, y))
        marks.append(f'<rect x="{_LEFT}" y="{y - 8}" width="{width:.1f}" height="16" fill="{_BAR}"/>')
        marks.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 4}" {_TEXT}>{format(value, form)}</text>')
    return _picture(title, len(bars), marks)


def _label(name: str, y: int) -> str:
    shown = escape(plain(name, one_line=True, limit=34))
    return f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end" {_TEXT}>{shown}</text>'


def _picture(title: str, rows: int, marks: Sequence[str]) -> str:
    width, height = _LEFT + _WIDTH + _RIGHT, 60 + rows * _ROW
    head = f'<text x="8" y="20" font-weight="bold" {_TEXT}>{escape(plain(title, one_line=True, limit=100))}</text>'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="#ffffff"/>', head, *marks, "</svg>", ""])
