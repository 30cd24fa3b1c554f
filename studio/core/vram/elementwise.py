"""What is computed number by number: turning heads by their positions, activations and norms composed in Python.

Sources: transformers/activations.py and modeling_*.py, transformers 5.24.
"""

from studio.core.shape import Layer
from studio.core.vram import operators as op
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor


def activated(activation: str, x: Tensor, *, widens: bool) -> Tensor:
    """Return an activation's output; those composed in Python save more than their input.

    Args:
        activation: transformers' name of it.
        x: Its input.
        widens: Whether autocast computes powers, expm1 and softplus in fp32, as CUDA's does, and so also what they are
            added to.
    """
    if activation == "gelu_new":
        half = op.scale(x)
        if widens:
            x = op.cast(x, 4)
        bent = op.activate_saving_result(op.scale(op.add(x, op.scale(op.power(x)))))
        return op.multiply(half, op.add_number(bent))
    if activation == "xielu":
        return _xielu(x, 4 if widens else x.itemsize)
    if activation == "relu2":
        return op.power(op.activate_saving_result(x))
    return op.activate(x)


def sparse(x: Tensor) -> Tensor:
    """Follow Gemma3nTextMLP._gaussian_topk: what is above a number of standard deviations."""
    row = Polynomial(per_token=1)
    mean = op.mean_last(x, row)
    deviation = op.result_of((x,), row, x.itemsize, (op.gradient_like(x),), (x,), works=(x.bytes,))
    above = op.subtract_rows(x, op.add(mean, deviation))
    return op.activate_saving_result(above)


def _xielu(x: Tensor, wide: float) -> Tensor:
    """Follow XIELUActivation._xielu_python, whose slopes and expm1 are in another format than x."""
    # Gradients of a narrow input are made wide, then cast by the engine (torch/csrc/autograd/engine.cpp).
    works = (x.elements.times(wide),) if wide != x.itemsize else ()
    slope = op.times_constant(x, wide, works=works)
    right = op.add(op.multiply(slope, x, works=works), op.times_constant(x))
    x.tape.named(slope)
    # expm1's backward is `grad * (result + 1)`.
    low = op.activate_saving_result(op.cast(op.least(x), wide), works=(x.elements.times(wide),))
    left = op.add(op.times_constant(op.subtract(low, x)), op.times_constant(x))
    return op.choose(right, left)


def rotated(layer: Layer, x: Tensor) -> Tensor:
    """Return queries or keys turned by their positions, in the layer's way."""
    if layer.rotary == 0:
        return x
    if layer.rotary_form == "complex":
        return _as_complex(x)
    if layer.rotary_form == "pairs":
        return _pairs(x)
    if layer.rotary_form == "parts":
        return _parts(x)
    if not layer.rotary_joined:
        return _halves(x)
    turned, kept = op.slice_last(x, layer.rotary), op.slice_last(x, 1 - layer.rotary)
    return op.join((_halves(turned), kept))


def _pairs(x: Tensor) -> Tensor:
    """Return neighbouring numbers turned against each other (apply_rotary_pos_emb_interleave of DeepSeek V3)."""
    even, odd = op.slice_last(x, 0.5), op.slice_last(x, 0.5)
    first = op.subtract(op.times_constant(even), op.times_constant(odd))
    second = op.add(op.times_constant(odd), op.times_constant(even))
    x.tape.named(even, odd)
    return op.join((first, second))


def _parts(x: Tensor) -> Tensor:
    """Return both halves of a head, `first * cos - second * sin` and `second * cos + first * sin`, joined (gpt-oss)."""
    first, second = op.split_last(x, (0.5, 0.5))
    one = op.subtract(op.times_constant(first), op.times_constant(second))
    other = op.add(op.times_constant(second), op.times_constant(first))
    return op.join((one, other))


def _as_complex(x: Tensor) -> Tensor:
    """Return neighbouring numbers turned as one complex number in fp32 (apply_rotary_emb of DeepSeek V2)."""
    wide = op.cast(x, 4)
    turned = op.times_constant(wide)
    x.tape.named(wide)
    return op.cast(turned, x.itemsize)


def _halves(x: Tensor) -> Tensor:
    """Return `x * cos + rotate_half(x) * sin`."""
    straight = op.times_constant(x)
    half = op.slice_last(x, 0.5)
    turned = op.times_constant(op.join((op.scale(op.slice_last(x, 0.5)), half)))
    return op.add(straight, turned)


def centred_norm(x: Tensor) -> Tensor:
    """Return a layer norm composed of plain operators in fp32; both differences from the mean are saved."""
    wide = op.cast(x, 4)
    mean = op.mean_last(wide, Polynomial(per_token=1))
    squares = op.power(op.subtract_rows(wide, mean))
    inverse = op.activate_saving_result(op.mean_last(squares, Polynomial(per_token=1)))
    normed = op.multiply_rows(op.subtract_rows(wide, mean), inverse)
    x.tape.named(wide, mean)
    out = op.cast(op.times_constant(normed), x.itemsize)
    x.tape.named(normed)
    return out


def rms_norm(x: Tensor, groups: float, *, weight_in_fp32: bool = False) -> Tensor:
    """Return an RMS norm computed in fp32.

    Args:
        x: What is normed.
        groups: Norms per token: 1 over the hidden size, the number of heads over head_dim.
        weight_in_fp32: Whether the weight is applied before the result is cast back (Gemma, OLMo 2).
    """
    wide = op.cast(x, 4)
    inverse = op.activate_saving_result(op.mean_last(op.power(wide), Polynomial(per_token=groups)))
    normed = op.multiply_rows(wide, inverse)
    if weight_in_fp32:
        out = op.cast(op.times_constant(normed), x.itemsize)
    else:
        out = op.times_constant(op.cast(normed, x.itemsize))
    x.tape.named(normed)
    return out


def unscaled_norm(x: Tensor, groups: float) -> Tensor:
    """Return an RMS norm without a weight."""
    wide = op.cast(x, 4)
    inverse = op.activate_saving_result(op.mean_last(op.power(wide), Polynomial(per_token=groups)))
    return op.cast(op.multiply_rows(wide, inverse), x.itemsize)
