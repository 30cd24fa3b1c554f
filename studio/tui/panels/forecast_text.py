"""The texts beside the gauge: the trade, and the question before a launch that does not fit."""

from textual.content import Content

from studio.core.errors import StudioError
from studio.core.fit import Fix
from studio.core.placement.columns import column_of
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.forecast import Outlook
from studio.probe.plan import PlanDevice
from studio.probe.trade import METHODS, Sides
from studio.tui.panels.fixes import saving_words
from studio.tui.readable import gib
from studio.tui.reading import STAGES, host_words, others_words
from studio.tui.services import Services
from studio.tui.trade import heads_of, rows_of

_LABEL, _CELL = 13, 13
"""Cells of a label, and of a column where room is short."""
_ROOMY_CELL, _WIDEST_CELL = 15, 16
"""Cells from which on a column's name takes one row, and the most that a column gets."""
_STYLES = {"fits": "$text-success", "tight": "$text-warning"} | dict.fromkeys(
    ("does not fit", "lacks RAM"), "$text-error"
)

_Parts = list[str | tuple[str, str]]


def with_room(sides: Sides, recipe: Recipe, width: int) -> Sides:
    """Return the columns that fit into some cells: LoRA, QLoRA and the recipe's own at least."""
    spared = [column for column in reversed(sides) if column not in (*METHODS, column_of(recipe))]
    spared = spared[: max(0, len(sides) - (width - _LABEL) // _CELL)]
    return {column: side for column, side in sides.items() if column not in spared}


def table_text(sides: Sides, recipe: Recipe, *, waiting: bool, width: int) -> Content:
    """Return the trade as rows; the column of the recipe is marked.

    Args:
        sides: The columns; where they do not all fit, LoRA, QLoRA and the one in use stay.
        recipe: The one in use.
        waiting: Whether the largest batches are still being worked out.
        width: Cells that there are.
    """
    own, sides = column_of(recipe), with_room(sides, recipe, width)
    kept = [head for _, head in heads_of(sides)]
    cell = min(_WIDEST_CELL, max(_CELL, (width - _LABEL) // len(sides)))
    if cell >= _ROOMY_CELL:
        kept = [(f"{first} {second}".rstrip().replace(" + ", "+"), "") for first, second in kept]
    marked = [("•" if column == own else " ") + first for column, (first, _) in zip(sides, kept, strict=True)]
    parts: _Parts = [(f"{'':{_LABEL}}" + "".join(f"{head:{cell}}" for head in marked).rstrip(), "bold")]
    if any(second for _, second in kept):
        parts.append((f"\n{'':{_LABEL}}" + "".join(f" {second:{cell - 1}}" for _, second in kept).rstrip(), "bold"))
    for label, *values in rows_of(sides, waiting=waiting):
        parts.append((f"\n{label:{_LABEL}}", "dim"))
        parts += [(f" {value:{cell - 1}}", _STYLES.get(value, "")) for value in values]
    return Content.assemble(*parts)


def over_budget_text(outlook: Outlook, device: PlanDevice, first: Fix | None, *, spills: bool) -> Content:
    """Return the question before a launch that does not fit.

    Args:
        outlook: What the recipe needs on this machine's card.
        device: That card.
        first: What `f` would do, where anything helps.
        spills: Whether the driver moves what does not fit into main memory.
    """
    stage = STAGES.get(outlook.estimate.stage, outlook.estimate.stage)
    name = plain(device.gpu.name, one_line=True, limit=60) if device.gpu else "the card"
    held, card = "", device.card
    if card is not None and card.used_bytes:
        who = f" ({others_words(card)})" if card.processes else ""
        held = f" Other processes hold {gib(card.used_bytes)} GiB of it{who}."
    peak = outlook.estimate.device
    parts: _Parts = [
        ("This does not fit.\n", "$text-error bold"),
        f"Estimated peak {gib(peak.expected)} GiB ({gib(peak.low)}-{gib(peak.high)}) {stage}; this run can get "
        f"{gib(outlook.budget_bytes)} GiB of {name}: {gib(outlook.over_bytes)} GiB too much.{held}\n",
        "It would probably end with out of memory"
        + (": the driver here would spill into main memory, so a run keeps to the card.\n" if spills else ".\n"),
        f"n, then f: {first.words} ({saving_words(first)}).\n" if first else "",
        "\nLaunch it all the same?",
    ]
    return Content.assemble(*parts)


def host_text(warning: str) -> Content:
    """Return the question before a launch that main memory is too small for."""
    parts: _Parts = [("Main memory is too small.\n", "$text-error bold"), f"{warning.partition('too small: ')[2]}\n"]
    return Content.assemble(*parts, "\nLaunch it all the same?")


def cpu_text(outlook: Outlook, planned: str, free_bytes: int | None) -> Content:
    """Return the question before a launch on a CPU.

    Args:
        outlook: What the recipe needs.
        planned: The card that the forecast is of; empty where it is of this machine.
        free_bytes: Main memory that is free, where that is too little.
    """
    device = outlook.estimate.device
    parts: _Parts = [("This would run on this machine's CPU.\n", "$text-warning bold")]
    if planned:
        parts.append(f"The forecast is of {plain(planned, one_line=True)}, which is not here; s saves the recipe.\n")
    if free_bytes is None:
        parts.append(f"It takes about {gib(device.expected)} GiB of main memory, and time.\n")
    else:
        short = f"It takes {gib(device.low)} GiB of main memory at least, and {gib(free_bytes)} are free.\n"
        parts += [(short, "$text-error"), "The system would probably end it, or something else with it.\n"]
    return Content.assemble(*parts, "\nLaunch it here all the same?")


def question_before_launch(
    recipe: Recipe, services: Services, planned: str = "", longest_tokens: int | None = None
) -> Content | None:
    """Return the question to ask when a recipe is expected not to fit; None where it fits or nobody can tell.

    The recipe is held against this machine's own card, whatever card is planned for. On a machine without a card, a
    recipe that was planned for one is asked about as well. Where the model cannot be sized yet, nothing is asked: the
    start says what is wrong with it.

    Args:
        recipe: What is to be launched.
        services: Find its model and this machine's card.
        planned: The card that the forecast is of; empty where it is of this machine.
        longest_tokens: Tokens of the longest row, where it is known.

    Raises:
        BadInput: The recipe's targets or rank do not suit the model.
    """
    try:
        forecaster = services.forecaster(recipe, "")
    except StudioError:
        return None
    forecaster.longest_tokens = longest_tokens
    outlook = forecaster.outlook(recipe)
    if forecaster.device.gpu is None:
        free_bytes = services.free_ram_bytes()
        too_large = free_bytes is not None and outlook.estimate.device.low > free_bytes
        return cpu_text(outlook, planned, free_bytes if too_large else None) if planned or too_large else None
    if outlook.verdict != "does not fit":
        return host_text(warning) if (warning := host_words(outlook, forecaster.ram_bytes)) else None
    first = forecaster.fix_that_fits(recipe)
    return over_budget_text(outlook, forecaster.device, first, spills=services.spills())
