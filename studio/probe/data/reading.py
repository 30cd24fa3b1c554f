"""How a data file is to be read: what a recipe says of it, and checks without a recipe ask for."""

from dataclasses import dataclass
from typing import Literal, Self

from studio.core.preferences import takes_pairs
from studio.core.recipe import OnBadRow, Recipe

Wants = Literal["any", "answers", "pairs", "labels"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data file is read.

    Attributes:
        format: `auto`, or the format that the file must have.
        answers_only: Whether only the answers will be trained. If not, a message that is marked as untrained is
            refused.
        on_bad_row: `stop`: a wrong row keeps the file from being used; `skip`: it is left out, and counted.
        wants: What the rows must be. `answers`: conversations and texts to learn, so that two answers of which one is
            preferred are refused. `pairs`: such preferences and nothing else (DPO, ORPO). `labels`: answers that say
            whether they are desirable (KTO). `any`: whatever the file has, for a check without an objective.
    """

    format: str = "auto"
    answers_only: bool = True
    on_bad_row: OnBadRow = "stop"
    wants: Wants = "answers"

    def key(self, ours: str) -> str:
        """Return what the file calls a column, a field of messages or a role that we call by this name."""
        return ours

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return how a recipe's data is read."""
        data = recipe.data
        wants: Wants = "pairs" if takes_pairs(recipe.train.objective) else "answers"
        return cls(data.format, data.answers_only, data.on_bad_row, wants)


AS_IT_IS = Reading()
"""The format is recognised, and answers alone are trained."""
