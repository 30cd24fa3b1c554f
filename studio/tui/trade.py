"""LoRA beside QLoRA for this model, data and card, as text. Rows that nobody can compute are left out."""

import math
from dataclasses import dataclass

from studio.core.base_form import base_form
from studio.core.evidence import seen_sign
from studio.core.recipe import Method, Recipe
from studio.probe.pace import Pace, pace_of
from studio.probe.quality import audited
from studio.runs.quality import LaneResult
from studio.tui.forecast import ADAPTER_BYTES_PER_PARAMETER, Forecaster, Outlook
from studio.tui.readable import UNKNOWN, gib

METHODS: tuple[Method, ...] = ("lora", "qlora")
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


@dataclass(frozen=True, slots=True)
class Side:
    """One method of the table.

    Attributes:
        outlook: What it needs.
        held_in: Precision of the base's weights.
        largest: Largest micro-batch that fits; None without a card or while it is worked out.
        pace: Speed and time; None while they are worked out.
        measured: What a race measured of it on this model and data; None where none was run.
    """

    outlook: Outlook
    held_in: str = UNKNOWN
    largest: int | None = None
    pace: Pace | None = None
    measured: LaneResult | None = None


def sides_of(recipe: Recipe, forecaster: Forecaster, *, batches: bool) -> dict[Method, Side]:
    """Return both methods of a recipe.

    Args:
        recipe: What is compared as LoRA and as QLoRA.
        forecaster: Estimates it.
        batches: Whether to add what takes milliseconds and more: largest batch, speed, and what a race has measured.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    raced = audited(recipe) if batches else {}
    sides: dict[Method, Side] = {}
    for method in METHODS:
        turned = recipe.with_("method", method)
        outlook = forecaster.outlook(turned)
        if batches:
            largest, pace = forecaster.largest_batch(turned), _pace(turned, forecaster)
            sides[method] = Side(outlook, base_form(turned), largest, pace, raced.get(method))
        else:
            sides[method] = Side(outlook, base_form(turned))
    return sides


def _pace(recipe: Recipe, forecaster: Forecaster) -> Pace:
    return pace_of(recipe, forecaster.shape, forecaster.setup(recipe), forecaster.device.gpu)


def rows_of(sides: dict[Method, Side], *, waiting: bool) -> list[tuple[str, str, str]]:
    """Return the rows of the table: what it is, for LoRA, for QLoRA.

    Args:
        sides: Both methods.
        waiting: Whether the largest batches are still being worked out.
    """
    pair = [sides[method] for method in METHODS]
    devices = [side.outlook.estimate.device for side in pair]
    trained = [side.outlook.estimate.trainable_parameters for side in pair]
    rows = [
        ("base held in", *(side.held_in for side in pair)),
        ("peak GiB, est.", *(gib(device.expected) for device in devices)),
        ("its range", *(f"{gib(device.low)}-{gib(device.high)}" for device in devices)),
    ]
    if any(side.outlook.verdict for side in pair):
        rows.append(("on this card", *(side.outlook.verdict or UNKNOWN for side in pair)))
        rows.append(("largest batch", *(_batch(side.largest, waiting) for side in pair)))
    rows += _pace_rows(pair, waiting)
    rows += [
        ("trained", *(f"{count / 1e6:.1f} M" for count in trained)),
        ("adapter file", *(_size(count * ADAPTER_BYTES_PER_PARAMETER) for count in trained)),
        ("merge", "into 16-bit", "through 16-bit"),
        *_quality_rows(pair),
        ("use", *_uses(pair)),
    ]
    return [(row[0], row[1], row[2]) for row in rows]


def footnote(sides: dict[Method, Side]) -> str:
    """Return what no cell of the table can say: how methods merge, what 4 bits cost, where the speed comes from."""
    pace = sides["lora"].pace
    speed = "" if pace is None else f" Speed: {pace.speed.basis}." if pace.speed else f" Speed: {pace.why_not}."
    words = _quality_words([sides[method] for method in METHODS])
    return f"Rows with est. are estimates. {MERGE} {words}{speed}"


def _quality_rows(pair: list[Side]) -> list[tuple[str, str, str]]:
    """Return the held-out losses and speeds that a race measured; without a race, a row that says so."""
    lora, qlora = (side.measured for side in pair)
    if lora is None or qlora is None:
        return [("quality", "the reference", "not measured")]
    more = qlora.more
    span = f"{more.low:+.3f} to {more.high:+.3f}" if more.low is not None and more.high is not None else UNKNOWN
    paces = [UNKNOWN if (pace := one.tokens_per_second) is None else f"{pace:,.0f}" for one in (lora, qlora)]
    return [
        ("loss, measured", f"{lora.loss.value:.3f}", f"{qlora.loss.value:.3f}"),
        ("4 bit adds", UNKNOWN, span),
        ("tok/s, raced", paces[0], paces[1]),
    ]


def _uses(pair: list[Side]) -> tuple[str, str]:
    """Return when to use each method, judged by a race where one was run, else by memory alone."""
    qlora = pair[1].measured
    if qlora is None or pair[0].measured is None:
        return "where it fits", "on less memory"
    sign = seen_sign(qlora.more)  # of the loss of QLoRA above that of LoRA; 0 where no difference can be seen
    if sign > 0:
        return "learns better", "saves memory"
    return ("as good", "as good, leaner") if sign == 0 else ("where it fits", "learns better")


def _quality_words(pair: list[Side]) -> str:
    raced = [side.measured for side in pair if side.measured]
    if len(raced) < len(pair):
        return QUALITY
    steps, tokens = raced[0].steps, raced[0].tokens
    rests = f"a race of {steps} steps each, {tokens} held-out tokens, 95 % interval"
    return f"Losses and raced speed are measured here: {rests}."


def _pace_rows(pair: list[Side], waiting: bool) -> list[tuple[str, str, str]]:
    """Return the rows on speed and time; hours only where the data can be looked at."""
    paces = [side.pace for side in pair]
    if None in paces:
        return [("tok/s, est.", WAITING, WAITING)] if waiting else []
    rows = [("tok/s, est.", *(_rates(pace) for pace in paces if pace))]
    slowdown = paces[1].slowdown if paces[1] else None
    if slowdown:
        rows.append(("a step, est.", "1", f"x{slowdown[0]:.2f}-{slowdown[2]:.2f}"))
    if any(pace.duration for pace in paces if pace):
        rows.append(("time, est.", *(_hours(pace) for pace in paces if pace)))
    return [(row[0], row[1], row[2]) for row in rows]


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
