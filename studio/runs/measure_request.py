"""What a measurement of a training step was asked to measure."""

from dataclasses import dataclass
from typing import ClassVar

HOW = ("auto", "trace")
"""`auto` measures on the card where there is one; `trace` never needs one."""


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """A training step whose memory is measured. All fields are texts, as every job's in `recipe.toml`.

    Attributes:
        recipe: TOML text of the recipe.
        how: One of `HOW`.
        device: `cuda` or `cpu`: what a trace is for.
        dtype: bf16, fp16 or fp32: what the recipe's `auto` means there.
        capability: Compute capability of the card, such as `8.0`.
    """

    kind: ClassVar[str] = "measure"
    recipe: str
    how: str = "auto"
    device: str = "cuda"
    dtype: str = "bf16"
    capability: str = "8.0"
