"""LoRA beside QLoRA for this model, data and card, as text. Rows that nobody can compute are left out."""

from dataclasses import dataclass

from studio.core.recipe import Method, Recipe
from studio.tui.forecast import ADAPTER_BYTES_PER_PARAMETER, Forecaster, Outlook
from studio.tui.readable import UNKNOWN, gib

METHODS: tuple[Method, ...] = ("lora", "qlora")
WAITING = "..."

QUALITY = (
    "Quality and time are not measured here. Published: QLoRA +0.009 to +0.10 validation loss and +16 to +105 % time "
    "against LoRA (LitGPT's table: 12 models of 1 to 8 B on one A10G; one seed, 100 rows)."
)
"""Extremes of LitGPT's finetuning tables; its +0.10 row also differs in rank, so its users read it as a ceiling."""

MERGE = (
    "Both merge into the 16-bit base. LoRA was trained on it; QLoRA on 4-bit weights, so its merged model differs from "
    "the trained one: compare the held-out loss."
)


@dataclass(frozen=True, slots=True)
class Side:
    """One method of the table.

    Attributes:
        outlook: What it needs.
        largest: Largest micro-batch that fits; None without a card or while it is worked out.
    """

    outlook: Outlook
    largest: int | None = None


def sides_of(recipe: Recipe, forecaster: Forecaster, *, batches: bool) -> dict[Method, Side]:
    """Return both methods; the largest batches take milliseconds and are left out unless asked for.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    sides: dict[Method, Side] = {}
    for method in METHODS:
        turned = recipe.with_("method", method)
        largest = forecaster.largest_batch(turned) if batches else None
        sides[method] = Side(forecaster.outlook(turned), largest)
    return sides


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
        ("peak, GiB", *(gib(device.expected) for device in devices)),
        ("its range", *(f"{gib(device.low)}-{gib(device.high)}" for device in devices)),
    ]
    if any(side.outlook.verdict for side in pair):
        rows.append(("on this card", *(side.outlook.verdict or UNKNOWN for side in pair)))
        rows.append(("largest batch", *(_batch(side.largest, waiting) for side in pair)))
    rows += [
        ("trained", *(f"{count / 1e6:.1f} M" for count in trained)),
        ("adapter file", *(_size(count * ADAPTER_BYTES_PER_PARAMETER) for count in trained)),
        ("merge", "into 16-bit", "through 16-bit"),
        ("quality", "the reference", "not measured"),
    ]
    return [(row[0], row[1], row[2]) for row in rows]


def _batch(largest: int | None, waiting: bool) -> str:
    if largest is None:
        return WAITING if waiting else UNKNOWN
    return str(largest) if largest else "none"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:.2f} GiB"
