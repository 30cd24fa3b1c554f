"""Which decoder layers of a streamed base wait in main memory, and how much of that may be used."""

BUFFERS = 2
"""Buffers on the card, each as large as the largest streamed layer: one is computed with, the other one is filled."""

HOST_SHARE = 0.85
"""Share of main memory that may wait for the card; the rest is the system's and the program's. A choice."""


def streamed_layers(wanted: int, layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers that are streamed, spread evenly over the model.

    A copy hides behind the computation since the copy before it. Spread out, each has as many layers to hide behind.

    Args:
        wanted: How many, at most.
        layers: How many the model has.
    """
    count = min(wanted, layers)
    return tuple(layer for layer in range(layers) if (layer + 1) * count // layers > layer * count // layers)
