"""The functions of our own loop that make several operators' work in one, as sizes: what each makes, saves and needs.

Sources: studio/jobs/train/adapted_linear.py and fused_forms.py. A function in Python saves what its backward needs when
it is done, after its result is there.
"""

from studio.core.layer_parts import Linear
from studio.core.vram import operators as op
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Node, Tensor


def adapted_linear(
    linear: Linear,
    x: Tensor,
    dropped: Tensor | None,
    visits: float,
    gradients: list[Tensor],
    *,
    compute: int,
    quantised: bool,
    keeps: bool = False,
) -> Tensor:
    """Return a linear layer's output with its pair's; a 4-bit layer gives back the format that it is given.

    What the pair reads is saved, its narrow product, and the 16-bit forms of B, and of A where somebody wants the
    gradient of its input.

    Args:
        linear: The linear layer.
        x: Its input.
        dropped: What the pair reads, where that is not x.
        visits: Rows per token.
        gradients: Where the fp32 gradients of A and B are kept.
        compute: Bytes per element of products.
        quantised: Whether the weight is dequantised for each product, forward and backward.
        keeps: Whether it is saved as the forward dequantised it.
    """
    tape = x.tape
    outputs, narrow = Polynomial(per_token=linear.outputs * visits), Polynomial(per_token_rank=visits)
    pair = Polynomial(per_rank=linear.inputs), Polynomial(per_rank=linear.outputs)
    weight = (Polynomial(fixed=linear.inputs * linear.outputs * compute),) if quantised else ()
    rows = op.cast(x, compute)
    read = rows if dropped is None else op.cast(dropped, compute)
    working = [Tensor(tape, size, 1) for size in weight]
    out = Tensor(tape, outputs, compute)
    tape.named(*working)
    copies = [Tensor(tape, elements, compute) for elements in reversed(pair)] if compute != 4 else []
    between = Tensor(tape, narrow, compute)
    kept = working if keeps and rows.node is not None else []
    tape.named(x, rows, read, out, between, *copies, *kept)
    if tape.records:
        wanted = (rows,) if dropped is None else (rows, read)
        saved = (read, between, *(copies if any(t.node for t in wanted) else copies[:1]), *kept)
        made_again = weight if rows.node is not None and not kept else ()
        node = _function(wanted, out, saved, (narrow.times(compute), *made_again))
        node.trained = pair, gradients
        node.turns = (tuple(copy.bytes for copy in copies),)
    return op.cast(out, x.itemsize if quantised else compute)


def _function(
    inputs: tuple[Tensor, ...], out: Tensor, saved: tuple[Tensor, ...], works: tuple[Polynomial, ...]
) -> Node:
    """Return the node behind a result that a function in Python has made: what it saves is saved when it is done."""
    node = out.tape.node(tuple(t.node for t in inputs), tuple(map(op.gradient_like, inputs)), saved, works)
    out.node, node.result = node, out.number
    return node


def rms_norm(x: Tensor, groups: float, *, by_kernel: bool) -> Tensor:
    """Return an RMS norm with a frozen weight: x and a number per norm are saved.

    Args:
        x: What is normed.
        groups: Norms per token.
        by_kernel: Whether one kernel makes it, and its gradient; otherwise both go through fp32 copies.
    """
    tape, wide, copied = x.tape, x.elements.times(4), x.itemsize != 4
    if by_kernel:
        out, inverse = Tensor(tape, x.elements, x.itemsize), Tensor(tape, Polynomial(per_token=groups), 4)
        tape.named(x, out, inverse)
    else:
        copies = [Tensor(tape, wide, 1)] if copied else []
        tape.passing(wide)
        inverse = Tensor(tape, Polynomial(per_token=groups), 4)
        copies.append(Tensor(tape, x.bytes, 1))
        out = Tensor(tape, x.elements, x.itemsize)
        tape.named(x, out, inverse, *copies)
    if x.node is not None and tape.records:
        works = () if by_kernel else (wide, wide) if copied else (wide,)
        node = _function((x,), out, (x, inverse), works)
        node.turns = () if by_kernel else ((wide,),) if copied else ((wide, wide),)
    return out
