"""The PyTorch operators of a decoder layer, as sizes: what each makes, saves for its backward, and needs on the way.

Sources: torch/csrc/autograd derivatives.yaml (what is saved), aten/src/ATen/autocast_mode.h (what autocast casts).
"""

from dataclasses import dataclass

from studio.core.vram.polynomial import NOTHING, Polynomial
from studio.core.vram.tape import Tape, Tensor


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Number formats of a step, in bytes per element.

    Attributes:
        compute: Of matrix products (2 for bf16 and fp16, 4 for fp32).
        residual: Of the residual stream.
        weights: Of embedding and head (4 after peft's `prepare_model_for_kbit_training`).
        autocast: Whether the forward runs under `torch.autocast`.
    """

    compute: int
    residual: int
    autocast: bool
    weights: int = 2


def result_of(
    inputs: tuple[Tensor, ...],
    elements: Polynomial,
    itemsize: float,
    gradients: tuple[tuple[Polynomial, float] | int | None, ...],
    saved: tuple[Tensor, ...] = (),
    *,
    works: tuple[Polynomial, ...] = (),
    base: Tensor | None = None,
) -> Tensor:
    """Return what an operator makes; its node stands behind it where one of the inputs wants a gradient.

    Args:
        inputs: What it reads; alive until the result is there, and so is what it would save.
        elements: Elements of the result.
        itemsize: Bytes per element of it.
        gradients: Per input the gradient's elements and bytes per element (`Node.gradients`).
        saved: What the backward needs.
        works: Bytes of what the backward makes on its way.
        base: What the result is a view of.
    """
    tape = inputs[0].tape
    edges = tuple([tensor.node for tensor in inputs]) if tape.records else ()
    node = tape.node(edges, gradients, saved, works) if any(edges) else None
    out = Tensor(tape, elements, itemsize, node, base)
    if node is None and saved:
        tape.named(*saved)
    now = len(tape.sizes)
    for tensor in inputs:
        (tensor.base or tensor).last_use = now
    return out


def gradient_like(tensor: Tensor) -> tuple[Polynomial, float]:
    """Return elements and bytes per element of a tensor's gradient."""
    return tensor.elements, tensor.itemsize


def _saving_constant(out: Tensor) -> Tensor:
    """Note that a number or a weight was saved: it adds no bytes, but a checkpoint is computed again to read it."""
    if out.node is not None:
        out.tape.saved_until = out.number
        out.node.unpacks = True
    return out


def _saving_itself(out: Tensor) -> Tensor:
    """Let a result be saved by its own operator."""
    if out.node is not None:
        out.tape.saves(out.node, out)
        out.tape.saving()
        out.node.unpacks = True
    return out


def cast(x: Tensor, itemsize: float) -> Tensor:
    """Return `x.to(dtype)`: x itself when nothing changes; a copy saves nothing and casts its gradient back."""
    if x.itemsize == itemsize:
        return x
    return result_of((x,), x.elements, itemsize, (gradient_like(x),))


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return `x + y` of equal shapes; gradients pass through, cast where the formats differ."""
    itemsize = max(x.itemsize, y.itemsize)
    sizes = tuple(None if t.itemsize == itemsize else gradient_like(t) for t in (x, y))
    return result_of((x, y), x.elements, itemsize, sizes)


def scale(x: Tensor) -> Tensor:
    """Return `x * number` or `x / number`: the number is saved, but no checkpoint is computed again for it.

    Saved-tensor hooks never see a wrapped number (torch/csrc/autograd/saved_variable.cpp).
    """
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),))


def add_number(x: Tensor) -> Tensor:
    """Return `x + number` or `x + mask`: a new tensor whose gradient passes through."""
    return result_of((x,), x.elements, x.itemsize, (None,))


def gather(x: Tensor, times: float) -> Tensor:
    """Return rows of x picked or summed by index, `times` as many as x has; the gradient is of x's size."""
    return result_of((x,), x.elements.times(times), x.itemsize, (gradient_like(x),))


def times_constant(x: Tensor, itemsize: float | None = None, *, works: tuple[Polynomial, ...] = ()) -> Tensor:
    """Return `x * weight` for a weight without a gradient, which lives anyway (norm weight, cos, sin)."""
    return _saving_constant(result_of((x,), x.elements, itemsize or x.itemsize, (gradient_like(x),), works=works))


def multiply(x: Tensor, y: Tensor, *, works: tuple[Polynomial, ...] = ()) -> Tensor:
    """Return `x * y` of activations: both are saved."""
    saved = tuple(t for t, other in ((x, y), (y, x)) if other.node is not None)
    sizes = (gradient_like(x), gradient_like(y))
    return result_of((x, y), x.elements, max(x.itemsize, y.itemsize), sizes, saved, works=works)


def activate(x: Tensor) -> Tensor:
    """Return an activation that saves its input (silu, gelu)."""
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), (x,))


def power(x: Tensor) -> Tensor:
    """Return `x ** n`: its backward is `grad * (n * x ** (n - 1))`, two temporaries beside the result.

    Source: torch/csrc/autograd/FunctionsManual.cpp pow_backward.
    """
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), (x,), works=(x.bytes, x.bytes))


def multiply_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x * factor` with one factor per row: the factor's gradient is a product of x's size, then summed."""
    sizes = (gradient_like(x), gradient_like(factor))
    return result_of((x, factor), x.elements, x.itemsize, sizes, (x, factor), works=(x.bytes,))


def activate_saving_result(x: Tensor, *, works: tuple[Polynomial, ...] = ()) -> Tensor:
    """Return an activation that saves its own result (relu, tanh, exp)."""
    return _saving_itself(result_of((x,), x.elements, x.itemsize, (gradient_like(x),), works=works))


def subtract(x: Tensor, y: Tensor) -> Tensor:
    """Return `x - y` of equal shapes: x's gradient passes on, y's is a negated copy in its own format."""
    itemsize = max(x.itemsize, y.itemsize)
    works = (x.elements.times(itemsize),) if y.itemsize != itemsize else ()
    return result_of((x, y), x.elements, itemsize, (None, gradient_like(y)), works=works)


def least(x: Tensor) -> Tensor:
    """Return `torch.min(x, number in a tensor)`: its backward halves the gradient of ties and masks the rest.

    Source: torch/csrc/autograd derivatives.yaml `minimum`.
    """
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), (x,), works=(x.elements, x.bytes))


def choose(x: Tensor, y: Tensor) -> Tensor:
    """Return `torch.where(mask, x, y)`: the mask is saved, a byte per element."""
    itemsize = max(x.itemsize, y.itemsize)
    mask = Tensor(x.tape, x.elements, 1)
    return result_of((x, y), x.elements, itemsize, (gradient_like(x), gradient_like(y)), (mask,))


def filled(parts: tuple[Tensor, ...]) -> Tensor:
    """Return an empty tensor into which parts are copied side by side.

    Each copy's backward clones the gradient to set the part to zero, and copies that part out of it
    (torch/csrc/autograd/functions/tensor.cpp CopySlices).
    """
    elements = Polynomial(*(sum(values) for values in zip(*(part.elements for part in parts), strict=True)))
    itemsize = parts[0].itemsize
    out = Tensor(parts[0].tape, elements, itemsize)
    for part in parts:
        copied = (None if out.node is None else (elements, itemsize), gradient_like(part))
        out = result_of((out, part), elements, itemsize, copied, base=out)
    return out


def dropout(x: Tensor, *, mask_itemsize: float = 1) -> Tensor:
    """Return `dropout(x)` for a probability above 0.

    Args:
        x: What is dropped.
        mask_itemsize: Bytes per element of the saved mask: one for CUDA's fused kernel, x's own for the CPU's noise
            (aten/src/ATen/native/Dropout.cpp).
    """
    mask = Tensor(x.tape, x.elements, mask_itemsize)
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), (mask,))


def times_vector(x: Tensor) -> Tensor:
    """Return `vector * x` in fp32, for a trained fp32 vector over the last dimension: x is saved.

    Its backward makes both products in fp32, sums one into the vector's gradient and casts the other to x's format.
    """
    wide = x.elements.times(4)
    return result_of((x,), x.elements, 4, (gradient_like(x),), (x,), works=(wide, wide))


def mean_last(x: Tensor, per_row: Polynomial) -> Tensor:
    """Return the mean over the last dimension, `per_row` elements; its gradient is spread and divided: of x's size."""
    return result_of((x,), per_row, x.itemsize, (gradient_like(x),))


def subtract_rows(x: Tensor, row: Tensor) -> Tensor:
    """Return `x - row` with one number per row: x's gradient passes on, the row's is summed from a negated copy."""
    return result_of((x, row), x.elements, x.itemsize, (None, gradient_like(row)), works=(x.bytes,))


def add_rows(total: Tensor, part: Tensor) -> Tensor:
    """Return `total.index_add_(rows, part)`, in place: the part's gradient is picked from the total's."""
    return result_of((total, part), total.elements, total.itemsize, (None, gradient_like(part)), base=total)


def clone(x: Tensor) -> Tensor:
    """Return a copy; the gradient passes through."""
    return result_of((x,), x.elements, x.itemsize, (None,))


def expanded(x: Tensor, times: float) -> Tensor:
    """Return a view in which x stands `times` times; its gradient is made whole and then summed."""
    return result_of((x,), x.elements.times(times), x.itemsize, (gradient_like(x),), base=x)


def laid_anew(x: Tensor) -> Tensor:
    """Return a view in another layout, whose gradient is copied back into x's own."""
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), base=x)


def slice_last(x: Tensor, share: float) -> Tensor:
    """Return `x[..., a:b]`, a view of a share of x; its gradient is a zero-filled tensor of x's whole size."""
    return result_of((x,), x.elements.times(share), x.itemsize, (gradient_like(x),), base=x)


def split_last(x: Tensor, shares: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Return the views of `x.chunk` or `x.split`; one backward node joins their gradients."""
    whole = result_of((x,), x.elements, x.itemsize, (gradient_like(x),), base=x)
    if whole.node is not None:
        whole.node.apart = True
    return tuple(Tensor(x.tape, x.elements.times(share), x.itemsize, whole.node, base=x) for share in shares)


def join(parts: tuple[Tensor, ...]) -> Tensor:
    """Return `torch.cat(parts)`; gradients are views of the joined one."""
    elements = Polynomial(*(sum(values) for values in zip(*(part.elements for part in parts), strict=True)))
    return result_of(parts, elements, parts[0].itemsize, (None,) * len(parts))


def frozen_linear(
    x: Tensor,
    outputs: Polynomial,
    compute: int | None = None,
    works: tuple[Polynomial, ...] = (),
    *,
    works_forward: bool = True,
    keeps_input: bool = False,
) -> Tensor:
    """Return `x @ W.T` for a frozen weight: only the weight is saved.

    Args:
        x: The input `[.., in]`.
        outputs: Elements of the result.
        compute: Bytes per element of the product where it is not the input's.
        works: Bytes of a dequantised weight, alive while the product runs, forward and backward.
        works_forward: Whether the forward needs it too.
        keeps_input: Whether the input is saved, though a frozen weight does not need it.
    """
    x = cast(x, compute or x.itemsize)
    working = [Tensor(x.tape, size, 1) for size in works if works_forward]
    out = result_of((x,), outputs, x.itemsize, (gradient_like(x),), (x,) if keeps_input else (), works=works)
    x.tape.named(*working)
    # bitsandbytes keeps a quantised weight as an attribute of its context (MatMul4Bit.forward: `ctx.tensors`), where
    # saved-tensor hooks do not see it: no checkpoint is computed again to read it.
    return out if works else _saving_constant(out)


def trained_linear(
    x: Tensor, outputs: Polynomial, weight: Polynomial, gradients: list[Tensor], arithmetic: Arithmetic
) -> Tensor:
    """Return `x @ W.T` for a trained fp32 weight: the input is saved, and under autocast 16-bit copies of both.

    Args:
        x: The input `[.., in]`.
        outputs: Elements of the result.
        weight: Elements of the weight.
        gradients: Where the fp32 gradient of the weight is kept.
        arithmetic: Formats of the step.
    """
    tape = x.tape
    itemsize = arithmetic.compute if arithmetic.autocast else 4
    x = cast(x, itemsize)
    copy = (Tensor(tape, weight, itemsize),) if arithmetic.autocast and itemsize != 4 else ()
    node = tape.node((x.node,), (gradient_like(x),), (x, *copy)) if tape.records else None
    if node is not None:
        node.trained = (weight,), gradients
    out = Tensor(tape, outputs, itemsize, node)
    tape.named(x, *copy)
    return out


def whole_weight(tape: Tape, elements: Polynomial, itemsize: float, gradients: list[Tensor]) -> Tensor:
    """Return a weight that is trained whole: its bytes count with what is always there, its gradient is kept."""
    node = tape.node() if tape.records else None
    if node is not None:
        node.keeps = gradients
    return Tensor(tape, elements, itemsize, node, base=Tensor(tape, NOTHING, 1))


def whole_linear(x: Tensor, outputs: Polynomial, weight: Tensor) -> Tensor:
    """Return `x @ W.T` for a weight that is trained whole: input and weight are saved."""
    x = cast(x, weight.itemsize)
    sizes = (gradient_like(x), gradient_like(weight))
    return result_of((x, weight), outputs, weight.itemsize, sizes, (x, weight))


def matmul(x: Tensor, y: Tensor, outputs: Polynomial, *, copies_x: bool, copies_y: bool) -> Tensor:
    """Return a batched product of activations, of copies where an operand's layout makes `matmul` make one."""
    x, y = clone(x) if copies_x else x, clone(y) if copies_y else y
    # The second operand's gradient is made first: BmmBackward0 takes its arguments by name, mat2 before self.
    return result_of((y, x), outputs, x.itemsize, (gradient_like(y), gradient_like(x)), (x, y))


def softmax_in_fp32(x: Tensor, *, fused_backward: bool = False) -> Tensor:
    """Return `softmax(x, dtype=torch.float32)`, which saves its result."""
    return softmax(x, 4, fused_backward=fused_backward)


def softmax(x: Tensor, itemsize: float | None = None, *, fused_backward: bool = False) -> Tensor:
    """Return a softmax in x's format or another; it saves its result.

    Its backward makes `grad * output` besides the gradient (aten/src/ATen/native/cuda/SoftMax.cu), except on a CPU
    (`fused_backward`).
    """
    itemsize = itemsize or x.itemsize
    works = () if fused_backward else (x.elements.times(itemsize),)
    out = _saving_itself(result_of((x,), x.elements, itemsize, (gradient_like(x),), works=works))
    if out.node is not None:
        out.node.works_last = True
    return out


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    flash: bool,
    workspaces: bool = True,
    masked: bool = False,
    value_share: float = 1,
    sinks: bool = False,
    groups: int = 1,
) -> Tensor:
    """Return scaled_dot_product_attention by a kernel without S x S matrices.

    It saves query, key, value, output and log-sum-exp. Of a boolean mask (`masked`) it makes one of numbers, the same
    for all heads, and saves that too (aten/src/ATen/native/transformers/attention.cpp convert_boolean_attn_mask). In
    the backward both kernels keep one fp32 number per row and head; besides, the query gradient is summed in fp32, and
    flash makes key and value gradients for every query head before it sums the heads of a group (in the same folder,
    cuda/flash_attn/flash_api.cpp mha_bwd, cuda/mem_eff_attention/kernel_backward.h). What the CPU's kernel allocates
    inside itself is not counted (`workspaces`). `value_share` is the width of a value's head in that of a query's.
    A sink is put into the output in place, by two tensors of one number per row and head (`sinks`,
    studio/jobs/base/sinks.py). Heads may be taken in several `groups` (studio/jobs/base/head_groups.py).
    """
    tape = query.tape
    statistics = Polynomial(per_token=heads)
    accumulator = (query.elements.times(4),) if query.itemsize < 4 else ()
    grouped = (query.bytes, query.bytes) if flash and key.elements != query.elements else ()
    works = (statistics.times(4), *accumulator, *grouped) if workspaces else ()
    if groups > 1:  # the gradients of a group, and its output and that one's gradient laid for the kernel
        own = (query.bytes, key.bytes, value.bytes, query.bytes, query.bytes)
        works = tuple(size.times(1 / groups) for size in (*works, *own))
    numbers = [Tensor(tape, Polynomial(per_square=1), query.itemsize)] if masked else []
    saved_sums = Tensor(tape, statistics, 4)
    gradients = (gradient_like(query), gradient_like(key), gradient_like(value))
    inputs = (query, key, value)
    outputs = query.elements.times(value_share)
    out = result_of(inputs, outputs, query.itemsize, gradients, (*inputs, saved_sums, *numbers), works=works)
    if out.node is not None:
        out.node.works_last = True
        tape.saves(out.node, out)
    if groups > 1:
        tape.passing(outputs.times(query.itemsize / groups))
    if sinks:
        tape.passing(statistics.times(4), statistics.times(4))
    return out
