"""An audit's report as files: JSON, Markdown and pictures, whole, in the folder of its run."""

import json
import re
from pathlib import Path
from typing import Any

from studio.core.audit_picture import bars_svg, losses_svg
from studio.core.audit_text import markdown_of
from studio.core.events import Saved
from studio.runs.atomic import write_whole
from studio.runs.worker import Worker

_MOST_BARS = 30
BESIDE_RUN = "audit.json"
"""The report of a run's adapter, left in that run's folder: a model card quotes it."""


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
    write_whole(root / "report.md", markdown)
    write_whole(worker.paths.report, json.dumps(report, indent=1, allow_nan=False))
    if path := report.get("run_path"):
        # A card quotes it under a heading of its own, and shows no rows of the user's data.
        beside = {**report, "markdown": re.sub("^#", "##", markdown_of(report, texts=False), flags=re.MULTILINE)}
        write_whole(Path(path) / BESIDE_RUN, json.dumps(beside, allow_nan=False))
    for name in (worker.paths.report.name, "report.md"):
        worker.emit(Saved, what="report", path=name)


def _pictures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return file name, what it shows and the picture."""
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
