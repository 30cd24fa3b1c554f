"""What only layers of Gemma 3n and Gemma 4 do, forward and backward.

Their values are normed, some layers take keys and values of one before, each layer has an input of its own, and Gemma
3n predicts and corrects several residual streams (AltUp).

Sources: modeling_gemma3n.py and modeling_gemma4.py, transformers 5.24.
"""

from studio.core.shape import Layer, Linear
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.polynomial import NOTHING, Polynomial
from studio.core.vram.tape import Tensor


def normed_heads(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as attention takes them: queries are ready before keys are made."""
    heads = layer.heads
    query = _placed(run, layer, run.linear(layer.qkv[0], x), heads.queries)
    if layer.keys_from == "before":
        size = Polynomial(per_token=heads.keys * heads.width)
        return query, _of_others(run, size, query.itemsize), _of_others(run, size, query.itemsize)
    raw = run.linear(layer.qkv[1], x)
    value = raw if layer.keys_from == "values" else run.linear(layer.qkv[2], x)
    key = _placed(run, layer, raw, heads.keys)
    return query, key, unscaled_norm(value, heads.keys)


def _placed(run: Modules, layer: Layer, x: Tensor, heads: int) -> Tensor:
    normed = run.head_norm(layer, x, heads)
    run.tape.named(x)
    turned = run.rotate(layer, normed)
    run.tape.named(normed)
    return turned


def unscaled_norm(x: Tensor, groups: float) -> Tensor:
    """Return an RMS norm without a weight."""
    wide = op.cast(x, 4)
    inverse = op.activate_saving_result(op.mean_last(op.power(wide), Polynomial(per_token=groups)))
    return op.cast(op.multiply_rows(wide, inverse), x.itemsize)


def _of_others(run: Modules, elements: Polynomial, itemsize: float) -> Tensor:
    """Return a tensor that another layer, or the model, holds: its bytes are not this layer's, its gradient is."""
    tape = run.tape
    node = tape.node() if tape.records else None
    if node is not None:
        node.keeps = []
    return Tensor(tape, elements, itemsize, node, base=Tensor(tape, NOTHING, 1))


def own_input(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return what the layer's own part of the input adds, made with a gate of x."""
    into, back = layer.per_layer
    gate = run.activation(layer, run.linear(into, x))
    part = _of_others(run, Polynomial(per_token=into.outputs), gate.itemsize)
    made = run.linear(back, op.multiply(gate, part))
    normed = run.norm(layer, made)
    run.tape.named(gate, made)
    return normed


def fed_by_both(run: Modules, layer: Layer, residual: Tensor, normed: Tensor) -> Tensor:
    """Return the sum of a dense MLP and of experts, each between norms of its own (Gemma4TextDecoderLayer)."""
    dense = run.norm(layer, run.mlp(layer, normed))
    routed = run.norm(layer, run.experts(layer, run.norm(layer, residual)))
    return op.add(dense, routed)


def predicted(run: Modules, layer: Layer, streams: Tensor) -> Tensor:
    """Follow Gemma3nTextAltUp.predict: every stream is predicted from all of them."""
    active = op.slice_last(streams, 1 / layer.streams)
    coefficients = run.linear(_named(layer, "prediction_coefs"), _modalities(run, layer, active))
    product = op.matmul(streams, coefficients, streams.elements, copies_x=False, copies_y=False)
    out = op.clone(op.add_rows(product, streams))
    run.tape.named(product, coefficients)
    return out


def corrected(run: Modules, layer: Layer, predictions: Tensor, activated: Tensor) -> Tensor:
    """Follow Gemma3nTextAltUp.correct, and add what the layer's own input gives to all streams but the first."""
    active = op.slice_last(predictions, 1 / layer.streams)
    coefficients = run.linear(_named(layer, "correction_coefs"), _modalities(run, layer, activated))
    innovation = op.gather(op.subtract(activated, active), layer.streams)
    product = op.multiply_rows(innovation, op.add_number(coefficients))
    out = op.add_rows(product, predictions)
    run.tape.named(innovation, coefficients)
    first = op.times_constant(op.clone(op.slice_last(out, 1 / layer.streams)))
    made = own_input(run, layer, first)
    run.tape.named(first)
    return op.add_rows(out, made)


def laurel(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Follow Gemma3nTextLaurelBlock: x and a narrow product of it."""
    narrow = run.linear(_named(layer, "linear_left"), x)
    made = run.norm(layer, run.linear(_named(layer, "linear_right"), narrow))
    out = op.add(x, made)
    run.tape.named(narrow)
    return out


def _modalities(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    normed = op.scale(run.norm(layer, x))
    routed = op.cast(run.linear(_named(layer, "modality_router"), normed), 4)
    out = op.cast(op.activate_saving_result(routed), x.itemsize)
    run.tape.named(normed, routed)
    return out


def _named(layer: Layer, name: str) -> Linear:
    return next(linear for linear in layer.beside if linear.name == name)
