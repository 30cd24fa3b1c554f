"""An audit's report as tables and words: the same for command line, screen and exported page.

Reads the report's plain values (`report.json`). Names of models, runs and files in it came from outside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from studio.core.audit import seen_sign
from studio.core.intervals import Interval
from studio.core.text import plain

Table = list[list[str]]
"""Rows of cells, the first row being the head."""

_MOST_BLOCKS = 8
_GIB = 2**30


def title_of(report: Mapping[str, Any]) -> str:
    """Return what was audited, in a line."""
    what, tokens = report.get("what"), tokens_of(report)
    rests = f"{tokens['task']:,} tokens of {report['rows']['task']} held-out rows"
    if what == "race":
        return f"race of {_shown(report['recipe'])} on {_shown(report['model'])}: {rests}"
    if what == "run":
        return f"run {_shown(report['run'])} on {_shown(report['model'])}: {rests}"
    return f"base {_shown(report['model'])}: {rests}"


def tokens_of(report: Mapping[str, Any]) -> dict[str, int]:
    """Return how many tokens the figures rest on, for the task and for the neutral text."""
    one = report["lanes" if report.get("what") == "race" else "variants"][0]
    return {part: int((one.get(part) or {}).get("tokens", 0)) for part in ("task", "neutral")}


def variant_table(report: Mapping[str, Any]) -> Table:
    """Return the table of variants: task loss with its interval first, then closeness, then sizes."""
    against = report["reference"]
    head = ["", "task loss", f"against {against}", "KL", "KL p99", "same top", "neutral loss"]
    head += ["base" if report["what"] == "base" else "on disk"]
    head += [] if report["what"] == "base" else ["to serve (estimate)"]
    rows = [head]
    for one in report["variants"]:
        task, is_reference = one["task"], one["name"] == against
        cells = [
            one["name"],
            interval(task["loss"]),
            "-" if is_reference else difference(task["more"]),
            "-" if is_reference else interval(task["kl"]),
            "-" if is_reference else f"{task['kl_tail']['value']:.3f}",
            "-" if is_reference else f"{task['same_top']['value']:.1%}",
            f"{one['neutral']['loss']['value']:.4f}",
            size(one["base_bytes"] if report["what"] == "base" else one["disk_bytes"]),
        ]
        if report["what"] != "base":
            serving = one["serving"]
            cells.append(f"{serving['low_bytes'] / _GIB:.2f}-{serving['high_bytes'] / _GIB:.2f} GiB")
        rows.append(cells)
    return rows


def block_table(report: Mapping[str, Any], most: int = _MOST_BLOCKS) -> Table:
    """Return the blocks, the worst first; nothing where the report has none."""
    blocks = report.get("blocks") or []
    if not blocks:
        return []
    if report["what"] == "base":
        head = ["block", "effect alone", "weight error", "worst layer", "16 bit costs"]
        return [head, *(_base_block(block, report["asked"]) for block in blocks[:most])]
    ordered = sorted(blocks, key=lambda block: -(block["ratio"] or 0.0))
    head = ["block", "rounding", "adapter", "rounding / adapter"]
    return [head, *(_run_block(block) for block in ordered[:most])]


def plan_table(report: Mapping[str, Any]) -> Table:
    """Return the measured mixed plans; nothing where none was measured."""
    plans = report.get("plans") or []
    head = ["kept in 16 bit", "costs", "KL won", "KL left", "task loss"]
    rows = [
        [
            ", ".join(plan["kept"]),
            size(plan["extra_bytes"]),
            interval(plan["won"]),
            f"{plan['figures']['kl']['value']:.4f}",
            interval(plan["figures"]["loss"]),
        ]
        for plan in plans
    ]
    return [head, *rows] if rows else []


def lane_table(report: Mapping[str, Any]) -> Table:
    """Return the lanes of a race side by side."""
    lanes = report["lanes"]
    first = lanes[0]["name"]
    rows = [
        ["", *(lane["name"] for lane in lanes)],
        ["held-out loss", *(interval(lane["task"]["loss"]) for lane in lanes)],
        [f"against {first}", *("-" if lane["name"] == first else difference(lane["task"]["more"]) for lane in lanes)],
        ["neutral loss", *(f"{lane['neutral']['loss']['value']:.4f}" for lane in lanes)],
        ["peak, predicted", *(size(lane["peak_predicted_bytes"]) for lane in lanes)],
        [_peak_label(lanes), *(size(lane["peak_measured_bytes"]) for lane in lanes)],
        ["tokens/s", *(_number(lane["tokens_per_second"], ",.0f") for lane in lanes)],
        ["seconds", *(_number(lane["seconds"], ",.0f") for lane in lanes)],
        ["adapter", *(size(lane["adapter_bytes"]) for lane in lanes)],
    ]
    return rows


def advice_lines(report: Mapping[str, Any]) -> list[str]:
    """Return what the report advises, why, and how sure that is."""
    advice = report["recommendation"]
    return [advice["sentence"], f"Why: {advice['reason']}", f"Rests on {advice['certainty']}."]


def tables_of(report: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return all tables of a report with their headings, those that it has."""
    if report["what"] == "race":
        found = [("Side by side", lane_table(report))]
    elif report["what"] == "base":
        found = [
            ("Roundings of the base", variant_table(report)),
            (f"Blocks that {report['asked']} hurts most", block_table(report)),
            ("Mixed plans, measured", plan_table(report)),
        ]
    else:
        found = [
            ("Forms of the trained model", variant_table(report)),
            ("Rounding beside adapter, relative to the weights", block_table(report)),
        ]
    return [(heading, table) for heading, table in found if table]


def markdown_of(report: Mapping[str, Any], pictures: Sequence[tuple[str, str]] = ()) -> str:
    """Return the report as a Markdown page.

    Args:
        report: Its plain values.
        pictures: Files beside the page, each with what it shows.
    """
    tokens = tokens_of(report)
    lines = [f"# Audit: {title_of(report)}", "", *advice_lines(report), ""]
    for heading, table in tables_of(report):
        lines += [f"## {heading}", "", *_markdown_table(table), ""]
    for what, file in pictures:
        lines += [f"![{what}]({file})", ""]
    lines += [
        f"Losses and KL in nats per token. Task: {tokens['task']:,} tokens of {report['rows']['task']} held-out rows; "
        f"neutral: {tokens['neutral']:,} tokens of {report['rows']['neutral']} passages. Intervals: 95 %, bootstrap "
        "over rows. Arithmetic in fp32, weights rounded by bitsandbytes.",
        "",
    ]
    return "\n".join(lines)


def interval(value: Mapping[str, float | None]) -> str:
    """Return a figure with the ends of its interval."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:.4f}"
    return f"{value['value']:.4f} ({value['low']:.4f}-{value['high']:.4f})"


def difference(value: Mapping[str, Any]) -> str:
    """Return a difference with the ends of its interval, marked where it is within the noise."""
    if value["low"] is None or value["high"] is None:
        return f"{value['value']:+.4f}"
    noise = "" if seen_sign(Interval(**value)) else ", noise"
    return f"{value['value']:+.4f} ({value['low']:+.4f} to {value['high']:+.4f}{noise})"


def size(size_bytes: float | None) -> str:
    """Return bytes in MiB, or GiB from one of them on; a question mark where they are not known."""
    if size_bytes is None:
        return "?"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < _GIB else f"{size_bytes / _GIB:.2f} GiB"


def _peak_label(lanes: Sequence[Mapping[str, Any]]) -> str:
    """Say what was measured: a CPU run knows only what its whole process holds, libraries included."""
    return "peak, whole process" if any(lane.get("peak_measured") == "resident" for lane in lanes) else "peak, measured"


def _base_block(block: Mapping[str, Any], asked: str) -> list[str]:
    worst = block["linears"][0] if block["linears"] else None
    effect = block["own_effect"]
    return [
        block["name"],
        "?" if effect is None else f"{effect:.2%}",
        f"{block['weight_error'][asked]:.2%}",
        f"{worst['name'].removeprefix(block['name'] + '.')} {worst['weight_error']:.2%}" if worst else "-",
        size(block["kept_extra_bytes"]),
    ]


def _run_block(block: Mapping[str, Any]) -> list[str]:
    ratio = "-" if block["ratio"] is None else f"{block['ratio']:.1f}"
    return [block["name"], f"{block['rounding']:.2%}", f"{block['adapter']:.3%}", ratio]


def _markdown_table(table: Table) -> list[str]:
    head, *rows = ([_cell(text) for text in row] for row in table)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    return plain(text, one_line=True).replace("|", "\\|")


def _shown(text: object) -> str:
    return plain(str(text), one_line=True, limit=120)


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)
