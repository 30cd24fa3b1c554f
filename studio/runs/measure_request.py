"""What a measurement of a training step was asked to measure."""

from dataclasses import dataclass
from typing import ClassVar

from studio.core.recipe import Recipe


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """A training step whose memory is measured.

    Attributes:
        recipe: The recipe whose step it is.
        how: `auto` measures on the card where there is one; `trace` never needs one.
        device: `cuda` or `cpu`: what a trace is for.
        dtype: bf16, fp16 or fp32: what the recipe's `auto` means there.
        capability: Compute capability of the card: major and minor.
    """

    kind: ClassVar[str] = "measure"
    recipe: Recipe
    how: str = "auto"
    device: str = "cuda"
    dtype: str = "bf16"
    capability: tuple[int, int] = (8, 0)
