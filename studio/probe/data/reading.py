"""How a data file is to be read: what a recipe says of it, and checks without a recipe ask for."""

from dataclasses import dataclass
from typing import Self

from studio.core.recipe import OnBadRow, Recipe


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data file is read.

    Attributes:
        format: `auto`, or the format that the file must have.
        answers_only: Whether only the answers will be trained. If not, a message that is marked as untrained is
            refused.
        on_bad_row: `stop`: a wrong row keeps the file from being used; `skip`: it is left out, and counted.
    """

    format: str = "auto"
    answers_only: bool = True
    on_bad_row: OnBadRow = "stop"

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """Return how a recipe's data is read."""
        data = recipe.data
        return cls(data.format, data.answers_only, data.on_bad_row)


AS_IT_IS = Reading()
"""The format is recognised, and answers alone are trained."""
