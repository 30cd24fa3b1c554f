"""The columns of the trade: a recipe as LoRA, as QLoRA, with a streamed 16-bit base, and with some layers in 16 bit.

No measurement of a base's layers is asked for: which of them 4 bits hurt most is not known here. Where the recipe names
none, the first and the last layers are kept, so many as fit.
"""

from collections.abc import Callable
from typing import Literal

from studio.core.layer_precision import SIXTEEN_BIT, layers_held_in, part_of
from studio.core.placement.streaming import BUFFERS
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape

Column = Literal["lora", "qlora", "streamed", "mixed"]
COLUMNS: tuple[Column, ...] = ("lora", "qlora", "streamed", "mixed")

_MOST_KEPT = 4
"""At most one layer in so many is kept in 16 bit: with more of them QLoRA saves little."""


def column_of(recipe: Recipe) -> Column:
    """Return the column that a recipe is itself."""
    if recipe.method == "lora":
        return "lora" if recipe.model.stream == "off" else "streamed"
    return "mixed" if recipe.model.precision else "qlora"


def columns_of(recipe: Recipe, shape: ModelShape, *, on_card: bool) -> dict[Column, Recipe]:
    """Return the columns that there are for a recipe; how many layers wait or are kept is chosen by `settled_columns`.

    Args:
        recipe: What is compared.
        shape: Its model.
        on_card: Whether it is for a card: nothing is streamed on a CPU.
    """
    own = column_of(recipe)
    rounded = recipe if recipe.method == "qlora" else recipe.with_("method", "qlora").with_("model.stream", "off")
    found: dict[Column, Recipe] = {
        "lora": recipe.with_("method", "lora").with_("model.stream", "off"),
        "qlora": rounded.with_("model.precision", ()),
    }
    if on_card and shape.quantised is None and shape.layers > BUFFERS:
        found["streamed"] = found["lora"].with_("model.stream", shape.layers)
    if shape.quantised is None and shape.layers >= _MOST_KEPT:
        found["mixed"] = _with_kept(rounded, shape, 1)
    found[own] = recipe
    return {
        column: found[column]
        for column in COLUMNS
        if column in found and (column == own or not found[column].problems() or column in ("lora", "qlora"))
    }


def settled_columns(
    recipe: Recipe,
    columns: dict[Column, Recipe],
    shape: ModelShape,
    budget_bytes: int | None,
    needs: Callable[[Recipe], int],
) -> dict[Column, Recipe]:
    """Return columns with numbers of layers.

    Where LoRA does not fit as it is, as few layers are streamed as are needed, else all. Of layers that stay in 16 bit
    as many as fit are kept.

    Args:
        recipe: What is compared; its own column stays as it is.
        columns: What `columns_of` returned.
        shape: The model.
        budget_bytes: What the run may use of the card; None where that is not known.
        needs: Returns the high end of what a recipe takes.
    """
    own, settled = column_of(recipe), dict(columns)
    if budget_bytes is None:
        return settled
    if "streamed" in columns and own != "streamed" and needs(columns["lora"]) > budget_bytes:
        settled["streamed"] = columns["streamed"].with_("model.stream", "auto")
    if "mixed" in columns and own != "mixed":
        low, top = 1, max(1, shape.layers // _MOST_KEPT)
        while low < top:
            middle = (low + top + 1) // 2
            fits = needs(_with_kept(columns["mixed"], shape, middle)) <= budget_bytes
            low, top = (middle, top) if fits else (low, middle - 1)
        settled["mixed"] = _with_kept(columns["mixed"], shape, low)
    return settled


def kept_layers(recipe: Recipe) -> int:
    """Return how many layers a recipe names that stay in 16 bit, whole or in part."""
    named = (part_of(name) for name, word in recipe.model.precision if word == SIXTEEN_BIT)
    return len({layer for part in named if part is not None for layer in part.layers or ()})


def _with_kept(recipe: Recipe, shape: ModelShape, count: int) -> Recipe:
    """Return a recipe with some of the first and the last layers in 16 bit."""
    numbers = [*range((count + 1) // 2), *range(shape.layers - count // 2, shape.layers)]
    return recipe.with_("model.precision", layers_held_in(SIXTEEN_BIT, numbers))
