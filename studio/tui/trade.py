"""LoRA beside QLoRA, a streamed base and QLoRA with layers in 16 bit, for this model, data and card, as text.

Rows that nobody can compute are left out.
"""

import math
from collections.abc import Callable

from studio.core.evidence import seen_sign
from studio.core.placement.columns import Column, kept_layers
from studio.core.vram.report import Range
from studio.probe.forecast import ADAPTER_BYTES_PER_PARAMETER, Outlook
from studio.probe.pace import Pace
from studio.probe.trade import METHODS, Side, Sides
from studio.runs.quality import LaneResult
from studio.tui.readable import UNKNOWN, count, gib

WAITING = "..."

QUALITY = (
    "Quality is not measured here. Published: QLoRA +0.009 to +0.10 validation loss against LoRA (LitGPT's table: 12 "
    "models of 1 to 8 B on one A10G; one seed, 100 rows)."
)
"""Extremes of LitGPT's finetuning tables; its row of +0.10 also differs in rank, so it is read as an upper bound."""

MERGE = (
    "Both merge into the 16-bit base. LoRA was trained on it; QLoRA on 4-bit weights, so its merged model differs from "
    "the trained one: compare the held-out loss."
)


def heads_of(sides: Sides) -> list[tuple[Column, tuple[str, str]]]:
    """Return what each column is called, in two rows."""
    return [(column, _head(column, side)) for column, side in sides.items()]


def _head(column: Column, side: Side) -> tuple[str, str]:
    if column in METHODS:
        return ("LoRA 16-bit", "") if column == "lora" else ("QLoRA 4-bit", "")
    if column == "streamed":
        return "LoRA", "streamed"
    layers = kept_layers(side.recipe) if side.outlook else 0
    return "QLoRA", f"+ {layers} layers" if layers else "+ layers"


def rows_of(sides: Sides, *, waiting: bool) -> list[tuple[str, ...]]:
    """Return the rows of the table: what it is, then a cell for each column.

    Args:
        sides: The columns.
        waiting: Whether the largest batches are still being worked out.
    """
    every = list(sides.values())
    rows: list[tuple[str, ...]] = [
        ("base held in", *(side.held_in if side.outlook else WAITING for side in every)),
        ("VRAM GiB est.", *_of_outlook(every, lambda one: gib(one.estimate.device.expected))),
        ("its range", *_of_outlook(every, lambda one: _ends(one.estimate.device))),
    ]
    if "streamed" in sides or any(side.host_bytes for side in every):
        rows.append(("main memory", *_of_outlook(every, lambda one: _waits(one.estimate.host.total))))
    if any(side.verdict for side in every):
        rows.append(("on this card", *(side.verdict or (UNKNOWN if side.outlook else WAITING) for side in every)))
        rows.append(("largest batch", *(_batch(side.largest, waiting) for side in every)))
    rows += _pace_rows(sides, waiting)
    rows += [
        ("trained", *_of_outlook(every, lambda one: f"{one.estimate.trainable_parameters / 1e6:.1f} M")),
        (
            "adapter file",
            *_of_outlook(every, lambda one: _size(one.estimate.trainable_parameters * ADAPTER_BYTES_PER_PARAMETER)),
        ),
        ("merge", *("into 16-bit" if side.recipe.method == "lora" else "via 16-bit" for side in every)),
        *_quality_rows(sides),
        ("use", *_uses(sides)),
    ]
    return rows


def _of_outlook(every: list[Side], told: Callable[[Outlook], str]) -> list[str]:
    return [told(side.outlook) if side.outlook else WAITING for side in every]


def _ends(device: Range) -> str:
    return f"{gib(device.low)}-{gib(device.high)}"


def _waits(size_bytes: int) -> str:
    return gib(size_bytes) if size_bytes else "-"


def footnote(sides: Sides) -> str:
    """Return what no cell of the table can say: how methods merge, what 4 bits cost, where the speed comes from."""
    pace = sides["lora"].pace
    speed = "" if pace is None else f" Speed: {pace.speed.basis}." if pace.speed else f" Speed: {pace.why_not}."
    if pace and pace.speed and pace.speed.launch_bound:
        speed += " It is launch-bound: more rows at once cost little time."
    between = ""
    if "streamed" in sides:
        between += " LoRA streamed learns as LoRA does; no card has run it yet."
    if "mixed" in sides and not sides["mixed"].measured:
        between += " In 16 bit are what the recipe names, else the first and last layers: the worst were not measured."
    return f"Rows with est. are estimates. {MERGE} {_quality_words(sides)}{between}{speed}"


def _raced(sides: Sides) -> tuple[LaneResult, LaneResult] | None:
    """Return what a race measured of LoRA and of QLoRA; None without one."""
    lora, qlora = sides["lora"].measured, sides["qlora"].measured
    return None if lora is None or qlora is None else (lora, qlora)


def _between(sides: Sides, *cells: str) -> list[str]:
    """Return cells for LoRA and QLoRA, with what is told of the columns between them."""
    told: dict[Column, str] = {"streamed": "as LoRA", "mixed": "not measured"}
    return [told.get(column) or cells[METHODS.index("lora" if column == "lora" else "qlora")] for column in sides]


def _quality_rows(sides: Sides) -> list[tuple[str, ...]]:
    """Return the held-out losses and speeds that a race measured; without a race, a row that says so."""
    if (pair := _raced(sides)) is None:
        return [("fidelity", *_between(sides, "reference", "not measured"))]
    lora, qlora = pair
    more = qlora.more
    span = f"{_short(more.low)}..{_short(more.high)}" if more.low is not None and more.high is not None else UNKNOWN
    paces = [count(one.tokens_per_second) for one in (lora, qlora)]
    return [
        ("held-out loss", *_between(sides, f"{lora.loss.value:.3f}", f"{qlora.loss.value:.3f}")),
        ("4 bit adds", *_between(sides, UNKNOWN, span)),
        ("tok/s, raced", *_between(sides, *paces)),
    ]


def _short(value: float) -> str:
    """Return a difference of losses with its sign: `+.018`."""
    return f"{value:+.3f}".replace("0.", ".", 1)


def _uses(sides: Sides) -> list[str]:
    """Return when to use each column, judged by a race where one was run, else by memory alone."""
    words = ("if it fits", "less memory")
    if (pair := _raced(sides)) is not None:
        sign = seen_sign(pair[1].more)  # of the loss of QLoRA above that of LoRA; 0 where no difference can be seen
        words = ("learns more", "saves memory") if sign > 0 else ("as good", "as good") if sign == 0 else words
        words = ("if it fits", "learns more") if sign < 0 else words
    told: dict[Column, str] = {"lora": words[0], "qlora": words[1], "streamed": "costs time", "mixed": "spends room"}
    return [told[column] for column in sides]


def _quality_words(sides: Sides) -> str:
    if (pair := _raced(sides)) is None:
        return QUALITY
    rests = f"a race of {pair[0].steps} steps each, {pair[0].tokens} held-out tokens, 95 % interval"
    return f"Losses and raced speed are measured here: {rests}."


def _pace_rows(sides: Sides, waiting: bool) -> list[tuple[str, ...]]:
    """Return the rows on speed and time; hours only where the data can be looked at."""
    every = list(sides.values())
    if any(side.pace is None for side in every):
        return [("tok/s, est.", *(WAITING for _ in every))] if waiting else []
    paces = [side.pace for side in every if side.pace]
    rows: list[tuple[str, ...]] = [("tok/s, est.", *(_rates(pace) for pace in paces))]
    slower = [_slower(column, pace) for column, pace in zip(sides, paces, strict=True)]
    if any(slower[1:]):
        rows.append(("a step, est.", *(word or "1" for word in slower)))
    if any(pace.duration for pace in paces):
        rows.append(("time, est.", *(_hours(pace) for pace in paces)))
    return rows


def _slower(column: Column, pace: Pace) -> str:
    """Return how many times as long a step takes as LoRA's; empty for LoRA, and where that is not known."""
    factor = {"lora": None, "streamed": pace.copying}.get(column, pace.slowdown)
    ends = [f"{factor[0]:.2f}", f"{factor[2]:.2f}"] if factor else []
    return f"x{'-'.join(dict.fromkeys(ends))}" if ends else ""


def _rates(pace: Pace) -> str:
    """Return the range of a speed in tokens a second: `73-99`, `1.2-3.4 k`."""
    if pace.speed is None:
        return "not known"
    low, high = pace.speed.low, pace.speed.high
    if high >= 1000:
        return f"{low / 1000:.1f}-{high / 1000:.1f} k"
    return f"{low:.0f}-{high:.0f}" if low >= 10 else f"{low:.1f}-{high:.1f}"


def _hours(pace: Pace) -> str:
    """Return the range of a duration, in minutes where it is short: `20-50 min`, `1.5-3.0 h`."""
    if pace.duration is None:
        return UNKNOWN
    low, high = pace.duration.low, pace.duration.high
    if low * 60 < 1:
        return f"under {math.ceil(high * 60)} min" if high < 2 else f"under {high:.1f} h"
    if high < 2:
        return f"{low * 60:.0f}-{high * 60:.0f} min"
    return f"{low:.1f}-{high:.1f} h" if high < 100 else f"{low:.0f}-{high:.0f} h"


def _batch(largest: int | None, waiting: bool) -> str:
    if largest is None:
        return WAITING if waiting else UNKNOWN
    return str(largest) if largest else "none"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:.2f} GiB"
