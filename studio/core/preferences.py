"""What learning from preferences asks for: which objectives take pairs, and at which rates they are trained."""

from collections.abc import Mapping
from typing import Any

from studio.core.recipe import Recipe

ADVISED_RATES: dict[str, tuple[float, str]] = {
    "dpo": (5e-6, "TRL's script for DPO with LoRA (trl/scripts/dpo.py)"),
    "orpo": (8e-5, "TRL's script for ORPO with LoRA (examples/scripts/orpo.py)"),
}
"""Learning rate and its source for each objective that learns from pairs."""

_FAR = 4.0
"""From so many times the advised rate on it is said: a habit of the field is to try half and twice of a rate."""


def takes_pairs(objective: str) -> bool:
    """Return whether an objective learns from pairs of answers."""
    return objective in ADVISED_RATES


def advised_rate(recipe: Recipe) -> float:
    """Return the learning rate that is advised for a recipe's objective; its own for objectives without advice."""
    return ADVISED_RATES.get(recipe.train.objective, (recipe.train.learning_rate,))[0]


def rate_note(recipe: Recipe) -> str:
    """Return what to know of a learning rate far above its objective's; empty where there is nothing to say."""
    if not takes_pairs(recipe.train.objective):
        return ""
    advised, source = ADVISED_RATES[recipe.train.objective]
    rate = recipe.train.learning_rate
    if rate < _FAR * advised:
        return ""
    return (
        f"train.learning_rate {rate:g} is {rate / advised:.0f} times the {advised:g} of {source}: at such rates "
        f"{recipe.train.objective} may make both answers unlikely. Set it near {advised:g}"
    )


def preferred_in_words(figures: Mapping[str, Any]) -> str:
    """Return the figures of pairs in a line: accuracy, margin and the log-probabilities of both sides.

    Args:
        figures: By the names of `studio.core.events.PAIR_FIGURES`; unknown ones are None.
    """
    known = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    said = []
    if known.get("accuracy") == 0 and known.get("margin") == 0:
        said.append("neither answer is preferred yet")
    elif "accuracy" in known:
        said.append(f"the chosen answer is preferred in {known['accuracy']:.0%} of the pairs")
    if "margin" in known:
        said.append(f"margin {known['margin']:+.3f}")
    if "chosen_logp" in known and "rejected_logp" in known:
        said.append(f"log-probability chosen {known['chosen_logp']:.2f}, rejected {known['rejected_logp']:.2f}")
    return ", ".join(said)
