"""What the merge screens say: choices, estimates, progress, the result. Foreign text is made harmless here."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from textual.content import Content

from studio.core.text import plain
from studio.probe.adapter_folder import Checkpoint
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.tui.merging import OutputEstimate

_LONGEST = 400
ONTO_WORDS = {
    "original": "the original 16-bit base: best for use, and for quantising later",
    "dequantized": "the base as 4 bits left it: closest to a QLoRA run (KL .0006, not .377), higher task loss; "
    "do not quantise it again",
}


def checkpoint_line(one: Checkpoint, best: Checkpoint | None) -> str:
    """Return a checkpoint in a list."""
    loss = "no held-out loss" if one.loss is None else f"held-out {one.loss:.3f}"
    what = "  the run's adapter" if one.folder is None else ""
    return f"step {one.step:<6} {loss}{'  best' if one == best else ''}{what}"


def output_line(row: OutputEstimate) -> str:
    """Return an output in the checklist."""
    return f"{row.words:<31} {size(row.out_bytes):>9}  RAM {size(row.ram_bytes):>8}  {_seconds(row.seconds)}"


def totals_text(rows: Sequence[OutputEstimate], free_ram: int | None, free_disk: int | None) -> Content:
    """Return what the chosen outputs take together, against what is free."""
    kept = sum(row.out_bytes or 0 for row in rows)
    # Outputs are made one after another: what one needs meanwhile is free again for the next.
    meanwhile = max(((row.disk_bytes or 0) - (row.out_bytes or 0) for row in rows), default=0)
    ram = max((row.ram_bytes or 0 for row in rows), default=0)
    if not kept:
        return Content("The size of the base is not known here, so neither is what the outputs take.")
    parts: list[Any] = ["about "]
    for needed, free, what in ((kept + meanwhile, free_disk, "disk"), (ram, free_ram, "RAM")):
        short = free is not None and needed > free
        parts += [(f"{size(needed)} of {size(free)} free {what}", "$text-error bold" if short else ""), ", "]
    return Content.assemble(*parts[:-1], " (estimates)")


def is_short(rows: Sequence[OutputEstimate], free_disk: int | None) -> bool:
    """Whether the outputs surely find no room on the disk."""
    kept = sum(row.out_bytes or 0 for row in rows)
    return free_disk is not None and kept > free_disk


def progress_line(what: str, paths: RunPaths | None, history: History, status: Status | None) -> Content:
    """Return how far one output is."""
    if paths is None or status is None:
        return Content.assemble((f"{what:<8}", "bold"), "waits for the merged model")
    if history.failed is not None:
        why = (
            f"{plain(history.failed.message, one_line=True, limit=_LONGEST)} {plain(history.failed.advice, limit=200)}"
        )
        return Content.assemble((f"{what:<8}", "bold"), ("failed: ", "$text-error bold"), why)
    if not status.live:
        style = "$text-success" if status is Status.finished else "$text-warning"
        where = "".join(f"  {plain(item.path, one_line=True)}" for item in history.saved[-1:])
        return Content.assemble((f"{what:<8}", "bold"), (str(status), style), where)
    phase = history.phase
    fraction = f" {phase.fraction:.0%}" if phase and phase.fraction is not None else ""
    doing = f"{phase.name} {phase.detail}" if phase else "starting"
    return Content.assemble((f"{what:<8}", "bold"), f"{plain(doing, one_line=True, limit=80)}{fraction}")


def waits_line(statuses: Mapping[str, Status]) -> str:
    """Return what is to be said of an output whose turn has not come.

    Args:
        statuses: Of the runs so far, in their order; the first is the merge.
    """
    merge, last = next(iter(statuses.values())), list(statuses.values())[-1]
    if merge in (Status.failed, Status.crashed, Status.stopped):
        return "is not made: there is no merged model"
    if last in (Status.crashed, Status.stopped):
        return f"is not made: the one before {'was stopped' if last is Status.stopped else 'crashed; resume it (R)'}"
    return "waits"


def read_report(paths: RunPaths) -> dict[str, Any]:
    """Return a merge's report; empty where there is none yet."""
    try:
        table = json.loads(paths.report.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def result_text(report: dict[str, Any]) -> Content:
    """Return the verification of a merge as a table, then what both models wrote."""
    if not report:
        return Content("")
    rows = [
        ("model", plain(str(report.get("merged")), one_line=True)),
        ("from", f"{plain(str(report.get('base')), one_line=True)} ({report.get('onto')})"),
        (
            "tensors",
            f"all {report.get('tensors')} read back, {report.get('recomputed_tensors')} made again: every bit equal",
        ),
        *_closeness(report.get("closeness")),
    ]
    if report.get("untied"):
        rows.append(("head", "no longer shared with the embedding: it was trained apart"))
    lines: list[Any] = []
    for name, value in rows:
        lines += [(f"{name:<18}", "bold"), f"{value}\n"]
    return Content.assemble(*lines, *_texts(report.get("side_by_side"), report.get("no_text")))


def _closeness(found: Any) -> list[tuple[str, str]]:
    if not isinstance(found, dict):
        return [("answers", "could not be compared: see the warnings in the run")]
    return [
        ("compared on", f"{found['tokens']} tokens with base + adapter, in fp32"),
        ("KL", f"mean {found['mean_kl']:.2g}, largest {found['largest_kl']:.2g} nats a token"),
        ("same top token", f"{found['same_top_token']:.1%}"),
        ("logits apart", f"{found['largest_logit_difference']:.3g} at the most"),
    ]


def _texts(written: Any, why_not: Any) -> list[Any]:
    if not isinstance(written, list) or not written:
        return [f"\nNo text side by side: {plain(str(why_not), one_line=True)}\n" if why_not else ""]
    lines: list[Any] = [("\nWhat both write\n", "bold")]
    for one in written:
        lines.append((f"{plain(str(one.get('prompt')), one_line=True, limit=200)}\n", "$text-muted"))
        for name, key in (("base + adapter", "separate"), ("merged", "merged")):
            lines.append(f"  {name:<16}{plain(str(one.get(key)), one_line=True, limit=_LONGEST)}\n")
    return lines


def size(size_bytes: float | None) -> str:
    """Return bytes in GB, as disks count them."""
    return "?" if size_bytes is None else f"{size_bytes / 1e9:.{2 if size_bytes < 1e10 else 0}f} GB"


def _seconds(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    low, high = found
    return f"{low:.0f}-{high:.0f} s" if high < 120 else f"{low / 60:.0f}-{high / 60:.0f} min"
