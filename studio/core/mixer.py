"""What mixes the tokens of a layer without attention, as numbers: part of a layer's shape (`studio.core.shape`).

Which families have which is read by `studio.core.mixers_from_config`; what one holds while it runs is said by
`studio.core.vram.mixers`.
"""

from dataclasses import dataclass
from typing import Literal

from studio.core.linear import Linear


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
