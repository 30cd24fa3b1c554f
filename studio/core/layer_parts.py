"""Parts of a layer as numbers: linear maps, the heads of attention, and what mixes tokens in their place.

`studio.core.shape` builds layers of them. Which families have which mixer is read by `studio.core.mixers_from_config`;
what one holds while it runs is said by `studio.core.vram.mixers`.
"""

from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True, slots=True)
class Heads:
    """How the attention of a layer is divided.

    Attributes:
        queries: Query heads.
        keys: Key and value heads.
        width: Width of a query's or a key's head.
        value_width: Width of a value's head.
    """

    queries: int
    keys: int
    width: int
    value_width: int

    @property
    def outputs(self) -> int:
        """Width of what attention hands to the projection back."""
        return self.queries * self.value_width


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: queries and keys with values are made from narrow vectors (DeepSeek V2).

    Only a part of each head carries positions, and that part of the key is one for all heads.

    Attributes:
        queries: Width of what queries are made from; 0 where they are made from the layer's input.
        keys: Width of what keys and values are made from.
        rotary: Width of the part of a head that carries positions.
    """

    queries: int
    keys: int
    rotary: int


@dataclass(frozen=True, slots=True)
class Mixer:
    """What mixes tokens by a state or a short convolution, instead of attention or beside it.

    Attributes:
        kind: Gated DeltaNet (`delta`), Mamba 2 and 1, or a gated short convolution (`conv`).
        place: Name of its module in the layer.
        inputs: Its linear maps but the last, in the order in which they run.
        out: The projection back.
        parameters: Its parameters beside linear maps: convolution, norms and numbers per head.
        channels: Channels of the convolution, 0 without one.
        kernel: Its width in positions.
        heads: Heads of the state: value heads of Gated DeltaNet, 0 for a convolution alone.
        groups: Heads of what reads and writes it: key heads of Gated DeltaNet, groups of Mamba 2.
        head_dim: Width of a head of values.
        state: The other width of a head's state: that of a key, or Mamba's state size.
        chunk: Positions that PyTorch's own code takes at once; 1 where it goes position by position.
        gate_norm: How the output is gated: by a norm that multiplies with the gate before it norms (`before`) or after
            (`after`), or without a norm.
        scales: Whether input, projections and output are multiplied by numbers (Falcon-H1).
        buffers: Elements of tables that it holds beside its parameters.
    """

    kind: Literal["delta", "mamba2", "mamba", "conv"]
    place: str
    inputs: tuple[Linear, ...]
    out: Linear
    parameters: int
    channels: int = 0
    kernel: int = 1
    heads: int = 0
    groups: int = 0
    head_dim: int = 0
    state: int = 0
    chunk: int = 1
    gate_norm: Literal["", "before", "after"] = ""
    scales: bool = False
    buffers: int = 0

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All its linear maps."""
        return (*self.inputs, self.out)
