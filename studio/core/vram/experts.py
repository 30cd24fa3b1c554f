"""Routed experts with symbolic tensors: our products in groups, and transformers' products with whole stacks.

Sources: studio/jobs/base/experts/product.py; transformers 5.24 integrations/moe.py grouped_mm_experts_forward.
"""

from typing import TYPE_CHECKING

from studio.core.experts import experts_per_group
from studio.core.shape import Layer, Linear
from studio.core.vram import operators as op
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor

if TYPE_CHECKING:
    from studio.core.vram.modules import Modules

_WEIGHTS_PER_SCALE = 64
"""bitsandbytes' block size: as many weights are dequantised by one fp32 scale."""
_INDEX_BYTES = 8
"""An int64, as torch's indices are."""


def whole_experts(run: "Modules", layer: Layer, x: Tensor) -> Tensor:
    """Return the output of grouped products: each token's input, gate, up and product for every expert it visits.

    Experts without a gate (Nemotron-H) have but their activation between the two products.
    """
    experts = layer.experts
    assert experts is not None  # noqa: S101  the caller looked
    rows = op.cast(op.gather(x, experts.per_token), run.traits.arithmetic.compute)
    up, back = experts.stacks(run.shape.hidden)
    both = op.frozen_linear(rows, Polynomial(per_token=up.outputs * experts.per_token))
    if experts.gated:
        gates, ups = op.split_last(both, (0.5, 0.5))
        product = op.multiply(op.activate(gates), ups)
    else:
        product = run.activation(layer, both)
    down = op.frozen_linear(product, Polynomial(per_token=back.outputs * experts.per_token))
    shares = op.mean_last(x, Polynomial(per_token=experts.per_token))  # what the router gives each chosen expert
    out = op.cast(op.gather(op.multiply_rows(down, shares), 1 / experts.per_token), x.itemsize)
    run.tape.named(rows, both, product, down, shares)
    return out


def grouped_experts(run: "Modules", layer: Layer, x: Tensor) -> Tensor:
    """Return the output of our products in groups, of which every group has an equal share of the rows.

    Kept for the backward are the widened rows; their inputs, answers and activations are made again, group by group.
    """
    experts, tape, compute = layer.experts, run.tape, run.traits.arithmetic.compute
    assert experts is not None  # noqa: S101  the caller looked
    up, down = experts.stacks(run.shape.hidden)
    visits, hidden, inner = experts.per_token, up.inputs, down.inputs
    share, dequantised = 1.0, [Polynomial(), Polynomial()]
    if run.traits.packed_experts:
        one = compute * max(up.inputs * up.outputs, down.inputs * down.outputs)
        at_once = experts_per_group(experts.count, one)
        share = at_once / experts.count
        dequantised = [_dequantised(stack, at_once, compute) for stack in (up, down)]

    def rows(width: int) -> Polynomial:
        """Return the bytes of the rows of one group."""
        return Polynomial(per_token=visits * share * width * compute)

    shares = op.mean_last(x, Polynomial(per_token=visits))
    order = Tensor(tape, Polynomial(per_token=visits), 2 * _INDEX_BYTES)  # where rows come from and go to
    pairs = [_pair(run, stack) for stack in (up, down)]
    kept = Tensor(tape, Polynomial(per_token=visits * up.outputs), compute)  # also before a checkpoint drops it
    answers = Tensor(tape, Polynomial(per_token=visits * hidden), x.itemsize)
    tape.passing(rows(hidden), dequantised[0], rows(up.outputs))
    tape.passing(rows(up.outputs), rows(inner), rows(inner))  # the activation, and its product with the other half
    tape.passing(rows(inner), dequantised[1], rows(hidden))
    tape.passing(rows(inner), rows(hidden), rows(hidden))  # weighed by the router
    trained = [factor for pair in pairs for factor in pair]
    inputs = (x, shares, *trained)
    saved = (kept, order, x) if pairs[0] else (kept, order)
    out = op.result_of(inputs, x.elements, x.itemsize, tuple(map(op.gradient_like, inputs)), saved)
    if out.node is not None:
        out.node.works = (answers.bytes, Polynomial(per_token=visits * _INDEX_BYTES))
        of_pairs = [factor.elements.times(4) for factor in trained]  # their gradients fill up group by group
        out.node.turns = (
            (*of_pairs, rows(hidden), rows(inner), rows(inner), dequantised[1], rows(inner)),
            (*of_pairs, rows(hidden), rows(hidden), *[rows(inner)] * 4),
            (*of_pairs, *[rows(inner)] * 8),
            (*of_pairs, rows(up.outputs), dequantised[0], rows(hidden)),
        )
    tape.named(answers, shares, order, kept)
    return out


def _dequantised(stack: Linear, experts: int, compute: int) -> Polynomial:
    """Return the bytes of a group's dequantised weights, and of their scales in fp32."""
    weights = stack.inputs * stack.outputs * experts
    return Polynomial(fixed=weights * compute + 4 * weights / _WEIGHTS_PER_SCALE)


def _pair(run: "Modules", stack: Linear) -> tuple[Tensor, ...]:
    """Return A and B of all experts of a stack, where it is adapted."""
    if stack.name not in run.traits.adapter.targets:
        return ()
    sides = (stack.inputs, stack.outputs)
    return tuple(
        op.whole_weight(run.tape, Polynomial(per_rank=side * stack.copies), 4, run.gradients) for side in sides
    )
