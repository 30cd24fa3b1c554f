"""Routed experts with symbolic tensors: our products in groups, and transformers' products with whole stacks.

Sources: studio/jobs/base/experts/product.py; transformers 5.24 integrations/moe.py grouped_mm_experts_forward.
"""

from studio.core.experts import experts_per_group
from studio.core.layer_parts import Linear
from studio.core.shape import Layer
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor
from studio.core.vram.tiles import dense

_WEIGHTS_PER_SCALE = 64
"""bitsandbytes' block size: as many weights are dequantised by one fp32 scale."""
_INDEX_BYTES = 8
"""An int64, as torch's indices are."""


def feed_forward(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return what a layer's MLP, its experts or both make of x."""
    if not layer.experts:
        return dense(run, layer, x)
    if layer.experts.given_all:
        return given_all(run, layer, x)
    out = routed(run, layer, x)
    return op.add(out, run.mlp(layer, x)) if layer.mlp else out


def routed(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return what the routed experts make of the tokens that come to them."""
    around = layer.experts.around if layer.experts else ()
    narrow = run.linear(around[0], x) if around else x
    out = grouped_experts(run, layer, narrow) if run.groups_experts else run.whole_experts(layer, narrow)
    return run.linear(around[1], out) if around else out


def given_all(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Follow Llama4TextMoe.forward: a copy of all tokens for each expert, times what the router gives it."""
    experts, arithmetic = layer.experts, run.traits.arithmetic
    assert experts is not None  # noqa: S101  the caller looked
    scores = op.mean_last(x, Polynomial(per_token=experts.count))
    rows = op.multiply_rows(op.gather(x, experts.count), scores)
    products = (grouped_experts if run.groups_experts else _all_experts)(run, layer, rows)
    shared = run.mlp(layer, x) if layer.mlp else None
    # CUDA's autocast sums up in fp32. A sum's gradient is spread over the experts in their format.
    wide = 4 if arithmetic.autocast and not run.traits.cpu else products.itemsize
    summed = op.result_of((products,), x.elements, wide, (op.gradient_like(products),))
    if shared is None:
        run.tape.named(rows, products, scores)
        return op.cast(summed, x.itemsize)
    of_sum = None if wide == shared.itemsize else op.gradient_like(summed)
    out = op.result_of((shared, summed), x.elements, shared.itemsize, (None, of_sum), base=shared)
    run.tape.named(rows, products, scores)
    return out


def _all_experts(run: Modules, layer: Layer, rows: Tensor) -> Tensor:
    """Follow Llama4TextExperts.forward, whose rows are all tokens for each expert."""
    experts = layer.experts
    assert experts is not None  # noqa: S101  the caller looked
    up, down = experts.stacks(run.shape.hidden)
    narrow = op.cast(rows, run.traits.arithmetic.compute)
    both = op.frozen_linear(narrow, Polynomial(per_token=up.outputs * experts.count))
    gates, ups = op.split_last(both, (0.5, 0.5))
    out = op.frozen_linear(op.multiply(ups, op.activate(gates)), Polynomial(per_token=down.outputs * experts.count))
    run.tape.named(rows, both)
    return out


def grouped_experts(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return the output of our products in groups, of which every group has an equal share of the rows.

    Kept for the backward are the widened rows; their inputs, answers and activations are made again, group by group.
    Where experts are given all tokens, x is a copy of these for each expert, and so is the output; only what is not
    zero is multiplied, and nothing is weighed by the router.
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

    weighs = not experts.given_all
    shares = op.mean_last(x, Polynomial(per_token=visits)) if weighs else None
    order = Tensor(tape, Polynomial(per_token=visits), 2 * _INDEX_BYTES)  # where rows come from and go to
    pairs = [_pair(run, stack) for stack in (up, down)]
    kept = Tensor(tape, Polynomial(per_token=visits * up.outputs), compute)  # also before a checkpoint drops it
    answers = Tensor(tape, Polynomial(per_token=visits * hidden) if weighs else x.elements, x.itemsize)
    tape.passing(rows(hidden), dequantised[0], rows(up.outputs))
    tape.passing(rows(up.outputs), rows(inner), rows(inner))  # the activation, and its product with the other half
    tape.passing(rows(inner), dequantised[1], rows(hidden))
    if weighs:
        tape.passing(rows(inner), rows(hidden), rows(hidden))
    trained = [factor for pair in pairs for factor in pair]
    inputs = (x, shares, *trained) if shares else (x, *trained)
    saved = (kept, order, x) if pairs[0] else (kept, order)
    gradients, base = tuple(map(op.gradient_like, inputs)), None if weighs else answers
    out = op.result_of(inputs, x.elements, x.itemsize, gradients, saved, base=base)
    if out.node is not None:
        index = Polynomial(per_token=visits * _INDEX_BYTES)
        # Gradients of pairs fill up group by group. Without weighing all gradients are there from the beginning.
        beside = [factor.elements.times(4) for factor in trained] if weighs else [index]
        out.node.works = (answers.bytes, index) if weighs else ()
        out.node.turns_last = not weighs
        out.node.turns = (
            (*beside, rows(hidden), rows(inner), rows(inner), dequantised[1], rows(inner)),
            *([(*beside, rows(hidden), rows(hidden), *[rows(inner)] * 4)] if weighs else []),
            (*beside, *[rows(inner)] * 8),
            (*beside, rows(up.outputs), dequantised[0], rows(hidden)),
        )
    tape.named(answers, shares, order, kept)
    return out


def _dequantised(stack: Linear, experts: int, compute: int) -> Polynomial:
    """Return the bytes of a group's dequantised weights, and of their scales in fp32."""
    weights = stack.inputs * stack.outputs * experts
    return Polynomial(fixed=weights * compute + 4 * weights / _WEIGHTS_PER_SCALE)


def _pair(run: Modules, stack: Linear) -> tuple[Tensor, ...]:
    """Return A and B of all experts of a stack, where it is adapted."""
    if stack.name not in run.traits.adapter.targets:
        return ()
    sides = (stack.inputs, stack.outputs)
    return tuple(
        op.whole_weight(run.tape, Polynomial(per_rank=side * stack.copies), 4, run.gradients) for side in sides
    )
