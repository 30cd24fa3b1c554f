"""Kernels of a decoder layer in each kind of loop: how many are launched, and what they move between products.

Counted of a decoder layer with grouped heads and a gated MLP. Launches of our loop are those that
`python -m tests.bench.bench_launches` counts in a trace; those of the stock loop were counted the same way before our
loop had functions of its own. What routed experts and mixers launch besides is not counted.
"""

from functools import lru_cache
from typing import NamedTuple

from studio.core.families import OWN_NORM, OWN_ROTARY
from studio.core.layer_precision import SIXTEEN_BIT
from studio.core.shape import ModelShape
from studio.core.trainable import adapted
from studio.core.vram.frozen import frozen_form, held_linears
from studio.core.vram.setup import Setup


class Moved(NamedTuple):
    """How often a layer reads or writes each 16-bit element, in the mean of its passes; a backward counts as two.

    Attributes:
        norm: In a norm.
        residual: In a sum, which reads two and writes one.
        activation: In an activation with its gate.
        rotary: For rotary positions.
        adapter_in: Of the input of an adapted linear map.
        adapter_out: Of its output.
    """

    norm: float
    residual: float
    activation: float
    rotary: float
    adapter_in: float
    adapter_out: float


_STOCK_MOVED = Moved(14, 3, 5, 10, 5, 7)
"""transformers' own operators, two of a norm's in fp32 (models/llama/modeling_llama.py); peft copies an adapter's
input, and scales and adds its output."""
_OWN_MOVED = Moved(2, 3, 5, 5, 1.25, 1.5)
"""One kernel a norm, rotary positions in three operators, and an adapter that is added in place
(jobs/train/fused_forms.py, adapted_linear.py): input read once forward, once for the pair's gradient, and its gradient
read and written; output read and written, and its gradient read twice."""
_COMPILED_MOVED = Moved(2, 2, 3, 2, 1.25, 1.5)
"""torch.compile joins what stands between two products; it does not join products."""


class _Launched(NamedTuple):
    """Kernels forward and backward: of a layer's own parts, and what each of its linear maps adds."""

    rest: tuple[int, int]
    adapted: tuple[int, int]
    four_bit: tuple[int, int]
    dropout: tuple[int, int]


_OWN_LAUNCHED = _Launched((13, 21), (4, 6), (1, 1), (1, 2))
_STOCK_LAUNCHED = _Launched((31, 57), (7, 9), (2, 1), (1, 2))
_NESTED = 2
"""More of a 4-bit weight whose scales are quantised, too: these, and their offset (bitsandbytes/backends/cuda/ops.py).
"""
_PLAIN = (1, 1)
"""Of a linear map without an adapter: its product, and that for the gradient of its input."""


def moved_of(shape: ModelShape, setup: Setup) -> Moved:
    """Return how often the layers of a model move each element."""
    if setup.engine != "studio":
        return _STOCK_MOVED
    if setup.compile:
        return _COMPILED_MOVED
    return _OWN_MOVED._replace(
        norm=_STOCK_MOVED.norm if shape.family in OWN_NORM else _OWN_MOVED.norm,
        rotary=_STOCK_MOVED.rotary if shape.family in OWN_ROTARY else _OWN_MOVED.rotary,
    )


def launches_of(shape: ModelShape, setup: Setup, names: frozenset[str]) -> float:
    """Return the kernels that a micro-batch launches in all layers, however few its tokens.

    Args:
        shape: The model.
        setup: How it is trained.
        names: Its targets.
    """
    table = _OWN_LAUNCHED if setup.engine == "studio" else _STOCK_LAUNCHED
    linears, paired = _maps(shape, names)
    rounded = _rounded(shape, setup) if setup.precision else linears * setup.quantised
    nested = _NESTED if setup.double_quant else 0
    forward, backward = (
        shape.layers * table.rest[way]
        + paired * (table.adapted[way] + (table.dropout[way] if setup.dropout else 0))
        + (linears - paired) * _PLAIN[way]
        + rounded * (table.four_bit[way] + nested)
        for way in (0, 1)
    )
    again = setup.recomputed_of(shape.layers) / shape.layers
    kept = rounded * again * paired / linears if setup.keeps_dequantised else 0
    spared = (table.four_bit[1] + nested) * kept
    return forward * (1 + again) + backward - spared


@lru_cache(maxsize=64)
def _maps(shape: ModelShape, names: frozenset[str]) -> tuple[int, int]:
    """Return how many linear maps there are beside routed experts, and how many of them are adapted."""
    linears = sum(count for count, linear in shape.all_linears() if linear.copies == 1)
    return linears, sum(count for count, linear in adapted(shape, names) if linear.copies == 1)


def _rounded(shape: ModelShape, setup: Setup) -> int:
    """Return how many linear maps are dequantised for their products, where not all are."""
    held = held_linears(shape, frozen_form(setup.kind))
    return sum(one.layers for one in held if one.precision != SIXTEEN_BIT and one.linear.copies == 1)
