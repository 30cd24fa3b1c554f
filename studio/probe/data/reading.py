"""How a data file is to be read: what a recipe says of it, and checks without a recipe ask for."""

from dataclasses import dataclass
from typing import Self

from studio.core.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data file is read.

    Attributes:
        format: `auto`, or the format that the file must have.
        answers_only: Whether only the answers will be trained. If not, a message that is marked as untrained is
            refused.
    """

    format: str = "auto"
    answers_only: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return how a recipe's data is read."""
        return cls(recipe.data.format, recipe.data.answers_only)


AS_IT_IS = Reading()
"""The format is recognised, and answers alone are trained."""
