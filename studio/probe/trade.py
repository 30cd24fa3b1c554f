"""A recipe as LoRA, as QLoRA, and as what lies between, each with what it takes, how fast it is and what was measured.

Screens and the command line show the same columns.
"""

from dataclasses import dataclass, replace

from studio.core.base_form import base_form
from studio.core.placement.columns import Column, columns_of, settled_columns
from studio.core.placement.streaming import HOST_SHARE
from studio.core.recipe import Method, Recipe
from studio.probe.forecast import Forecaster, Outlook
from studio.probe.pace import Pace, pace_of
from studio.probe.quality import audited
from studio.runs.quality import LaneResult

METHODS: tuple[Method, ...] = ("lora", "qlora")


@dataclass(frozen=True, slots=True)
class Side:
    """One column of the table.

    Attributes:
        recipe: What it is of.
        outlook: What it needs; None while that is worked out.
        held_in: Precision of the base's weights.
        ram_bytes: Main memory of the computer; None where it is not known.
        largest: Largest micro-batch that fits; None without a card or while it is worked out.
        pace: Speed and time; None while they are worked out.
        measured: What a race measured of it on this model and data; None where none was run.
    """

    recipe: Recipe
    outlook: Outlook | None = None
    held_in: str = ""
    ram_bytes: int | None = None
    largest: int | None = None
    pace: Pace | None = None
    measured: LaneResult | None = None

    @property
    def host_bytes(self) -> int:
        """What waits in main memory."""
        return 0 if self.outlook is None else self.outlook.estimate.host.total

    @property
    def lacks_ram(self) -> bool:
        """Whether main memory is too small for it."""
        return self.ram_bytes is not None and self.host_bytes > HOST_SHARE * self.ram_bytes

    @property
    def verdict(self) -> str:
        """Whether it fits the card and main memory; empty without a card."""
        verdict = self.outlook.verdict if self.outlook else None
        return "lacks RAM" if verdict and verdict != "does not fit" and self.lacks_ram else verdict or ""


Sides = dict[Column, Side]


def sides_of(recipe: Recipe, forecaster: Forecaster, *, batches: bool) -> Sides:
    """Return the columns of a recipe.

    Args:
        recipe: What is compared as LoRA, as QLoRA and as what lies between.
        forecaster: Estimates it.
        batches: Whether to add what takes milliseconds and more: what lies between the two, largest batch, speed, and
            what a race has measured.

    Raises:
        BadInput: The recipe cannot be estimated.
    """
    columns = columns_of(recipe, forecaster.shape, on_card=forecaster.device.gpu is not None)
    if batches:
        budget = forecaster.device.budget_bytes(recipe)

        def needs(turned: Recipe) -> int:
            return forecaster.outlook(turned).estimate.device.high

        columns = settled_columns(recipe, columns, forecaster.shape, budget, needs)
    raced = audited(recipe) if batches else {}
    sides: Sides = {}
    for column, turned in columns.items():
        if not batches and column not in METHODS and turned is not recipe:
            sides[column] = Side(turned)
            continue
        outlook, held_in = forecaster.outlook(turned), _held_in(turned, column)
        side = Side(turned, outlook, held_in, forecaster.ram_bytes)
        if batches:
            setup = forecaster.setup(turned)
            most = turned.with_("model.stream", forecaster.shape.layers) if column == "streamed" else turned
            side = replace(
                side,
                recipe=turned.with_("model.stream", setup.stream),
                largest=forecaster.largest_batch(most),
                pace=pace_of(turned, forecaster.shape, setup, forecaster.device.gpu),
                measured=raced.get(column),
            )
        sides[column] = side
    return sides


def _held_in(recipe: Recipe, column: Column) -> str:
    """Return the format of the base's layers, and of how many it is another one."""
    return f"{recipe.model.quant_type} and more" if column == "mixed" else base_form(recipe)
