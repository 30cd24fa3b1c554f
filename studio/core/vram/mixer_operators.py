"""The operators that only mixers use, as sizes (`studio.core.vram.operators` has all others)."""

from studio.core.vram import operators as op
from studio.core.vram.operators import gradient_like, result_of
from studio.core.vram.polynomial import Polynomial
from studio.core.vram.tape import Tensor


def per_token(elements: float) -> Polynomial:
    """Return a size for every token."""
    return Polynomial(per_token=elements)


def fused(given: tuple[Tensor, ...], elements: Polynomial, itemsize: float) -> Tensor:
    """Return what a kernel makes that saves its inputs and its result, and computes all else again."""
    out = result_of(given, elements, itemsize, tuple(gradient_like(t) for t in given), given)
    if out.node is not None:
        out.tape.saves(out.node, out)
    return out


def times(x: Tensor, y: Tensor) -> Tensor:
    """Return `x * y` of equal shapes in the wider format; the narrower's gradient is cast back from it."""
    itemsize = max(x.itemsize, y.itemsize)
    saved = tuple(t for t, other in ((x, y), (y, x)) if other.node is not None)
    works = () if x.itemsize == y.itemsize else (x.elements.times(itemsize),)
    return result_of((y, x), x.elements, itemsize, (gradient_like(y), gradient_like(x)), saved, works=works)


def minus(x: Tensor, y: Tensor) -> Tensor:
    """Return `x - y` of equal shapes: y's gradient is negated, and cast where its format is another."""
    works = () if x.itemsize == y.itemsize else (x.bytes,)
    return result_of((x, y), x.elements, max(x.itemsize, y.itemsize), (None, gradient_like(y)), works=works)


def squared(x: Tensor) -> Tensor:
    """Return `x * x`, whose gradient is made twice."""
    return result_of((x, x), x.elements, x.itemsize, (gradient_like(x), gradient_like(x)), (x,))


def padded(x: Tensor, ratio: float) -> Tensor:
    """Return a row padded to whole chunks: a copy, even where nothing is added."""
    return result_of((x,), x.elements.times(ratio), x.itemsize, (gradient_like(x),))


def pairwise(x: Tensor, chunk: int) -> Tensor:
    """Return the differences of all pairs within a chunk; one gradient is summed from a negated copy."""
    elements = x.elements.times(chunk)
    sizes = (gradient_like(x), gradient_like(x))
    return result_of((x, x), elements, x.itemsize, sizes, works=(elements.times(x.itemsize),))


def masked(x: Tensor, chunk: int) -> Tensor:
    """Return a copy with another number where a mask of booleans says so, which is saved."""
    mask = Tensor(x.tape, Polynomial(fixed=chunk * chunk), 1)
    return result_of((x,), x.elements, x.itemsize, (gradient_like(x),), (mask,))


def solved(triangle: Tensor, right: Tensor) -> Tensor:
    """Return `linalg.solve_triangular`: triangle and result are saved, the triangle's gradient takes three matrices."""
    sizes = (gradient_like(triangle), gradient_like(right))
    out = result_of((triangle, right), right.elements, right.itemsize, sizes, (triangle,), works=(triangle.bytes,))
    if out.node is not None:
        out.tape.saves(out.node, out)
    return out


def copied_into(total: Tensor, part: Tensor) -> Tensor:
    """Return `total[:, i] = part`: backward every such copy makes the whole gradient anew (CopySlices)."""
    wide = part.elements.times(total.itemsize)
    works = (wide, wide) if total.node is not None else (total.bytes, wide)
    sizes = (gradient_like(total), gradient_like(part))
    return result_of((total, part), total.elements, total.itemsize, sizes, base=total, works=works)


def exponential(x: Tensor) -> Tensor:
    """Return `exp(x)`, in fp32 as CUDA's autocast has it."""
    return op.activate_saving_result(op.cast(x, 4))
