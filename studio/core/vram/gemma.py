"""What only layers of Gemma 3n and Gemma 4 do, forward and backward.

Each layer has an input of its own, and Gemma 3n predicts and corrects several residual streams (AltUp).

Sources: modeling_gemma3n.py and modeling_gemma4.py, transformers 5.24.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from studio.core.layer_parts import Linear
from studio.core.shape import Layer, ModelShape
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.polynomial import NOTHING, Polynomial
from studio.core.vram.tape import Tensor

_OWN_INPUTS = "per_layer_model_projection"


@dataclass(frozen=True, slots=True)
class AroundStreams:
    """What Gemma3nTextModel.forward keeps outside its layers, in bytes per token.

    Attributes:
        before: What is there until the last layer has gone backward.
        behind: What is kept where all residual streams become one, until that has gone backward.
    """

    before: int = 0
    behind: int = 0


def around_streams(shape: ModelShape, targets: frozenset[str], narrow: int, wide: int) -> AroundStreams:
    """Return what is kept before and behind the layers of a model with several residual streams.

    Each stream but the first is a projection, scaled to the magnitude of the first: multiplied by that magnitude and
    divided by its own. A magnitude's powers are taken from a wide copy, and the product before the division is wide;
    both are saved.

    Args:
        shape: The model.
        targets: Names of the adapted linear maps.
        narrow: Bytes per element of what projections give.
        wide: Bytes per element of the streams.
    """
    streams, hidden, widths = shape.groups[0].layer.streams, shape.hidden, shape.per_layer_width
    if streams == 1:
        return AroundStreams()
    others = (streams - 1) * hidden
    into, back, own = (name in targets for name in ("altup_projections", "altup_unembed_projections", _OWN_INPUTS))
    before = others * 2 * wide if into else 0
    before += hidden * narrow if into or own else 0  # the adapters' input, which is the embedding
    before += widths * wide if own else 0  # what their norm reads
    # Keys turned by wide positions are wide; those and values are there once for each kind of attention.
    layers = [group.layer for group in shape.groups]
    if any(layer.keys_from == "before" for layer in layers):
        handed = {(layer.heads, layer.window) for layer in layers if layer.keys_from != "before"}
        before += sum(heads.keys * heads.width * (narrow + wide) for heads, _ in handed)
        before -= shape.stored_heads_width * narrow  # counted already, as in every model that hands them on
    behind = streams * hidden * wide + others * (2 * wide + narrow + (narrow if back else 0))
    return AroundStreams(before, behind)


def left_behind_keys(
    shape: ModelShape, targets: frozenset[str], itemsizes: tuple[int, int], order: Sequence[int], again: Sequence[bool]
) -> list[Polynomial]:
    """Return, for the last layer of each way through a step, what checkpointed layers left behind in the backward.

    A layer that hands on its keys and values makes new ones when it is computed again. These keep alive what they were
    made of: the layer's input and the streams predicted from it. All of it stays until the step ends.

    Args:
        shape: The model.
        targets: Names of the adapted linear maps.
        itemsizes: Bytes per element of what products read, and of the streams.
        order: Of each layer the number of its way.
        again: Of each way, whether its layers are checkpointed.
    """
    left, (narrow, wide) = [NOTHING] * len(again), itemsizes
    layers = [shape.groups[kind].layer for kind in shape.order]
    if not any(layer.streams > 1 and layer.keys_from == "before" for layer in layers):
        return left
    hands_on = {layer.window: index for index, layer in enumerate(layers) if layer.keys_from != "before"}
    for index in hands_on.values():
        if not again[order[index]]:
            continue
        layer = layers[index]
        of_streams = layer.streams * shape.hidden * (2 * wide + narrow)
        inputs = sum(linear.name in targets for linear in (_named(layer, "modality_router"), *layer.qkv[1:]))
        of_heads = 2 * layer.heads.keys * layer.heads.width * wide  # what the norms of keys and values read
        # Gradients that later layers gave to the keys and values wait until this one goes backward.
        waiting = Polynomial(per_token=layer.heads.keys * layer.heads.width * (wide + narrow))
        size = Polynomial(per_token=of_streams + inputs * shape.hidden * narrow + of_heads)
        for way in (way for way, checkpointed in enumerate(again) if checkpointed):
            last = len(layers) - 1 - order[::-1].index(way)
            if index > last:
                left[way] = left[way].plus(size)
            elif layers[last].keys_from != "before":
                left[way] = left[way].plus(waiting)
    return left


def own_input(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return what the layer's own part of the input adds, made with a gate of x."""
    into, back = layer.per_layer
    gate = run.activation(layer, run.linear(into, x))
    part = run.of_others(Polynomial(per_token=into.outputs), gate.itemsize)
    made = run.linear(back, op.multiply(gate, part))
    normed = run.norm(layer, made)
    run.tape.named(gate, made)
    return normed


def predicted(run: Modules, layer: Layer, streams: Tensor) -> Tensor:
    """Follow Gemma3nTextAltUp.predict: every stream is predicted from all of them."""
    active = op.slice_last(streams, 1 / layer.streams)
    coefficients = run.linear(_named(layer, "prediction_coefs"), _modalities(run, layer, active))
    arithmetic = run.traits.arithmetic
    compute = arithmetic.compute if arithmetic.autocast else streams.itemsize
    narrow, coefficients = op.cast(streams, compute), op.cast(coefficients, compute)
    product = op.matmul(narrow, coefficients, streams.elements, copies_x=False, copies_y=False)
    out = op.cast(op.clone(op.add_rows(product, streams)), streams.itemsize)  # .contiguous().type_as(hidden_states)
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
    # corrected_predictions[active].clone(): the sum below is added to the others in place.
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
