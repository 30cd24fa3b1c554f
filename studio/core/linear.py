"""A linear map of a layer, as numbers: part of attention, of an MLP, of experts and of state mixers alike."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear map of a layer; `copies` is how many of it the layer has (experts held as separate modules)."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1

    @property
    def weights(self) -> int:
        """Weights without biases."""
        return self.inputs * self.outputs * self.copies

    @property
    def biases(self) -> int:
        """Bias terms."""
        return self.outputs * self.copies if self.bias else 0
