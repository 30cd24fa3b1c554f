"""Whether a recipe fits what this machine has free at the moment of its launch. Takes up to a second."""

from textual.content import Content

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.tui.engine import Engine
from studio.tui.fixes import fix_that_fits
from studio.tui.panels.forecast_text import cpu_text, over_budget_text


def question_before_launch(recipe: Recipe, engine: Engine, planned: str = "") -> Content | None:
    """Return the question to ask when a recipe is expected not to fit; None where it fits or nobody can tell.

    The card is this machine's, whatever is planned for; on a CPU a recipe that was planned for a card is asked about
    as well. A model that cannot be sized yet asks nothing: the start says what is wrong with it.

    Raises:
        BadInput: The recipe's targets or rank do not suit the model.
    """
    try:
        forecaster = engine.forecaster(recipe, "")
    except StudioError:
        return None
    outlook = forecaster.outlook(recipe)
    if forecaster.card.gpu is None:
        free_bytes = engine.free_ram_bytes()
        too_large = free_bytes is not None and outlook.estimate.device.low > free_bytes
        return cpu_text(outlook, planned, free_bytes if too_large else None) if planned or too_large else None
    if outlook.verdict != "does not fit":
        return None
    return over_budget_text(outlook, forecaster.card, fix_that_fits(recipe, forecaster), spills=engine.spills())
