"""What the merge screens say: choices, estimates, progress, the result. Foreign text is made harmless here."""

from collections.abc import Mapping, Sequence
from typing import Any

from textual.content import Content

from studio.core.export_formats import export_checks
from studio.core.text import plain
from studio.probe.adapter_folder import Checkpoint
from studio.runs.history import History
from studio.runs.status import Status
from studio.tui.merging import MERGED, OutputEstimate
from studio.tui.readable import duration

_LONGEST = 400
ONTO_WORDS = {
    "original": "the original 16-bit base: best for use, and for quantising later",
    "dequantized": "the base as 4 bits left it: closest to a QLoRA run (KL .0006, not .377), higher task loss; "
    "do not quantise it again",
}


OUTPUTS_HEAD = f"{'Make (space chooses)':<35}{'leaves':>10}{'disk':>10}{'RAM':>10}  time"
"""Above the checklist, whose marks take four cells."""


def checkpoint_line(one: Checkpoint, best: Checkpoint | None) -> str:
    """Return a checkpoint in a list."""
    if one.damage:
        return f"step {one.step:<6} damaged: {one.damage}"
    loss = "no held-out loss" if one.loss is None else f"held-out {one.loss:.3f}"
    what = "  the run's adapter" if one.folder is None else ""
    return f"step {one.step:<6} {loss}{'  best' if one == best else ''}{what}"


def output_line(row: OutputEstimate) -> str:
    """Return an output in the checklist."""
    figures = "".join(f"{size(figure):>10}" for figure in (row.out_bytes, row.disk_bytes, row.ram_bytes))
    return f"{row.words:<31}{figures}  {_seconds(row.seconds)}"


def totals_text(rows: Sequence[OutputEstimate], free_ram: int | None, free_disk: int | None) -> Content:
    """Return what the chosen outputs take together, against what is free."""
    kept = sum(row.out_bytes or 0 for row in rows)
    # Outputs are made one after another: the space that one needs only while it is made is free again for the next.
    meanwhile = max(((row.disk_bytes or 0) - (row.out_bytes or 0) for row in rows), default=0)
    ram = max((row.ram_bytes or 0 for row in rows), default=0)
    if not kept:
        return Content("The size of the base is not known here, so neither is what the outputs take.")
    parts: list[Any] = ["about "]
    for needed, free, what in ((kept + meanwhile, free_disk, "disk"), (ram, free_ram, "RAM")):
        short = free is not None and needed > free
        parts += [(f"{size(needed)} of {size(free)} free {what}", "$text-error bold" if short else ""), ", "]
    return Content.assemble(*parts, _all_seconds(rows))


def is_short(rows: Sequence[OutputEstimate], free_disk: int | None) -> bool:
    """Return whether the outputs surely do not fit on the disk."""
    kept = sum(row.out_bytes or 0 for row in rows)
    return free_disk is not None and kept > free_disk


def progress_line(history: History, status: Status, seconds: float, ended: str = "") -> Content:
    """Return how far one output is.

    Args:
        history: What its run has told.
        status: The run's status.
        seconds: How long it has been made, or how long it took.
        ended: How its process ended, where that is known.
    """
    if history.failed is not None and not status.live:
        why = (
            f"{plain(history.failed.message, one_line=True, limit=_LONGEST)} {plain(history.failed.advice, limit=200)}"
        )
        return Content.assemble(("failed: ", "$text-error bold"), why)
    if not status.live:
        if status is Status.crashed:
            why = ended or "the process ended without saying why"
            return Content.assemble(("crashed: ", "$text-error bold"), f"{why}. R goes on with what is whole of it.")
        style = "$text-success" if status is Status.finished else "$text-warning"
        took = f" in {duration(seconds)}" if status is Status.finished else ""
        where = "".join(f"  {plain(item.path, one_line=True)}" for item in history.saved[-1:])
        return Content.assemble((str(status), style), took, where)
    phase = history.phase if status is not Status.starting else None  # else it is that of the last worker
    fraction = f" {phase.fraction:.0%}" if phase and phase.fraction is not None else ""
    doing = f"{phase.name} {phase.detail}" if phase else "starting"
    return Content(f"{plain(doing, one_line=True, limit=80)}{fraction}  {duration(seconds)}")


def said_text(form: str, history: History) -> Content:
    """Return what the run of an output found out about it, then its warnings, each on a new line."""
    end = history.finished
    checks = export_checks(end.result) if form != MERGED and end else []
    parts: list[Any] = [f"\n{plain(line, one_line=True)}" for line in checks]
    parts += [(f"\n{plain(event.message)}", "$text-warning") for event in history.warnings]
    return Content.assemble(*parts)


def waits_line(statuses: Mapping[str, Status]) -> str:
    """Return what to say of an output whose turn has not come.

    Args:
        statuses: Of the runs so far, in their order; the first is the merge.
    """
    merge, last = next(iter(statuses.values())), list(statuses.values())[-1]
    if merge in (Status.failed, Status.crashed, Status.stopped):
        return "is not made: there is no merged model"
    if last in (Status.crashed, Status.stopped):
        return f"is not made: the one before {'was stopped' if last is Status.stopped else 'crashed; resume it (R)'}"
    return "waits"


def result_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the verification of a merge as names and values, then what both models wrote; empty without a report.

    A name without a value is a heading.
    """
    if not report:
        return []
    rows = [
        ("Verified", ""),
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
    return [*rows, *_texts(report.get("side_by_side"), report.get("no_text"))]


def _closeness(found: Any) -> list[tuple[str, str]]:
    if not isinstance(found, dict):
        return [("answers", "could not be compared: see the warnings in the run")]
    return [
        ("compared on", f"{found['tokens']} tokens with base + adapter, in fp32"),
        ("KL", f"mean {found['mean_kl']:.2g}, largest {found['largest_kl']:.2g} nats a token"),
        ("same top token", f"{found['same_top_token']:.1%}"),
        ("logits apart", f"{found['largest_logit_difference']:.3g} at the most"),
    ]


def _texts(written: Any, why_not: Any) -> list[tuple[str, str]]:
    if not isinstance(written, list) or not written:
        return [("text", f"none side by side: {plain(str(why_not), one_line=True)}")] if why_not else []
    rows = [("What both write", "")]
    for one in written:
        rows.append(("asked", plain(str(one.get("prompt")), one_line=True, limit=200)))
        for name, key in (("base + adapter", "separate"), ("merged", "merged")):
            rows.append((name, plain(str(one.get(key)), one_line=True, limit=_LONGEST)))
    return rows


def size(size_bytes: float | None) -> str:
    """Return bytes in GB, as disks count them."""
    return "?" if size_bytes is None else f"{size_bytes / 1e9:.{2 if size_bytes < 1e10 else 0}f} GB"


def _seconds(found: tuple[float, float] | None) -> str:
    if found is None:
        return ""
    low, high = found
    return f"{low:.0f}-{high:.0f} s" if high < 120 else f"{low / 60:.0f}-{high / 60:.0f} min"


def _all_seconds(rows: Sequence[OutputEstimate]) -> str:
    """Return the time of outputs that are made one after another."""
    known = [row.seconds for row in rows if row.seconds]
    return _seconds((sum(low for low, _ in known), sum(high for _, high in known))) if known else ""
