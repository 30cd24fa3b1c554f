"""Which objective a recipe asks for."""

from studio.core.recipe import Recipe
from studio.jobs.train.objectives import Objective
from studio.jobs.train.objectives.preference import Preferences
from studio.jobs.train.objectives.supervised import SUPERVISED


def objective_of(recipe: Recipe) -> Objective:
    """Return what a recipe's training learns."""
    train = recipe.train
    if train.objective == "sft":
        return SUPERVISED
    return Preferences(train.objective == "orpo", train.beta, train.label_smoothing, recipe.data.answers_only)
