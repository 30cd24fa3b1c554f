"""How the attention of a layer is divided: its heads, and the narrow vectors of latent attention."""

from dataclasses import dataclass


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
