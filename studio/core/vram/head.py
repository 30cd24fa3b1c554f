"""The end of the model: final norm, head and loss, forward and backward.

Sources: studio/jobs/train/head.py, liger_kernel fused_linear_cross_entropy.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Protocol

from studio.core.loss_chunk import loss_chunk_tokens
from studio.core.shape import ModelShape
from studio.core.trainable import HEAD
from studio.core.vram import operators as op
from studio.core.vram.modules import LayerTraits, Modules
from studio.core.vram.polynomial import NOTHING, Polynomial, uncovered
from studio.core.vram.tape import Events, Tape, Tensor, alive_after, marks, recomputed, run_backward

_SOFTCAP_BYTES, _CHUNK_BYTES = 12, 8
"""Bytes per logit of a chunk in studio/jobs/train/head.py: fp32 logits, logsumexp's temporary, a soft cap's slope.

What logsumexp allocates inside itself on a CPU is no tensor that a trace sees, so it is not counted.
"""


class Loss(Protocol):
    """How head and loss are made: a frozen value."""

    def __hash__(self) -> int: ...

    @property
    def in_chunks(self) -> bool:
        """Whether logits are never whole."""

    def forward(self, run: Modules, hidden: Tensor) -> Tensor:
        """Return the loss of the final norm's output `[batch, seq, hidden]`."""

    def chunk_bytes(self, shape: ModelShape, traits: LayerTraits, tokens: int) -> int:
        """Return what a chunk of the head needs at once; 0 for whole logits."""


@dataclass(frozen=True, slots=True)
class WholeLoss:
    """Our loop's whole logits."""

    in_chunks: ClassVar[bool] = False

    def forward(self, run: Modules, hidden: Tensor) -> Tensor:
        """Return the loss. The 16-bit logits die once `logits.float()` (studio/jobs/train/head.py) has copied them."""
        return cross_entropy(op.cast(logits_of(run, hidden), 4))

    def chunk_bytes(self, shape: ModelShape, traits: LayerTraits, tokens: int) -> int:
        """Return 0: there are no chunks."""
        return 0


@dataclass(frozen=True, slots=True)
class ChunkedLoss:
    """Our loop's head, taken in chunks.

    Attributes:
        recomputed: Whether the head is trained, so that each chunk is computed again in the backward.
    """

    recomputed: bool = False
    in_chunks: ClassVar[bool] = True

    def forward(self, run: Modules, hidden: Tensor) -> Tensor:
        """Return the loss."""
        return _recomputed_rows(hidden) if self.recomputed else chunked(hidden)

    def chunk_bytes(self, shape: ModelShape, traits: LayerTraits, tokens: int) -> int:
        """Return what a chunk of a frozen head needs at once."""
        chunk, compute = loss_chunk_tokens(shape.vocabulary, tokens), traits.arithmetic.compute
        if shape.logit_softcap:
            return chunk * shape.vocabulary * _SOFTCAP_BYTES
        # fp32 logits beside their 16-bit product, later beside 16-bit probabilities and the chunk's gradient. In fp32
        # the product is the logits, so `% 4` counts them once.
        narrow = 4 + compute % 4
        inner = narrow if traits.cpu else _CHUNK_BYTES
        return chunk * max(inner * shape.vocabulary, narrow * shape.vocabulary + compute * shape.hidden)


@dataclass(frozen=True, slots=True)
class LigerLoss:
    """liger's kernel for head and loss.

    Attributes:
        wider: Bytes per logit of a wider copy of a chunk's logits, where the kernel makes one first.
    """

    wider: int = 0
    in_chunks: ClassVar[bool] = True

    def forward(self, run: Modules, hidden: Tensor) -> Tensor:
        """Return the loss."""
        return chunked(hidden)

    def chunk_bytes(self, shape: ModelShape, traits: LayerTraits, tokens: int) -> int:
        """Follow liger_kernel/ops/fused_linear_cross_entropy.py: gradients overwrite the chunk's logits."""
        share = -(-tokens // -(-shape.vocabulary // shape.hidden))
        chunk = min(tokens, 1 << max(0, share - 1).bit_length())
        return chunk * shape.vocabulary * (traits.arithmetic.compute + self.wider)


@dataclass(frozen=True, slots=True)
class ChunkMarks:
    """High-water marks of one chunk of a trained head, in the chunk's own tokens, and what stands beside it.

    Attributes:
        forward: Marks of its forward.
        forward_beside: What stands beside it, in a polynomial of all tokens.
        backward: Marks of computing it again and of its backward.
        backward_beside: What stands beside that, in a polynomial of all tokens.
    """

    forward: tuple[Polynomial, ...]
    forward_beside: Polynomial
    backward: tuple[Polynomial, ...]
    backward_beside: Polynomial


@dataclass(frozen=True, eq=False, slots=True)
class HeadMarks:
    """What is alive, in bytes, beside what the layers keep; the last layer's output is counted here.

    Attributes:
        forward: High-water marks on the way forward.
        backward: The same on the way back.
        around_chunk: What stands around a chunk of the head while that one is worked out; nothing for whole logits.
        chunk: The chunk itself, where the head is trained.
        evaluation: Marks without a graph, where logits are whole; the same as forward where they are not.
    """

    forward: tuple[Polynomial, ...]
    backward: tuple[Polynomial, ...]
    around_chunk: Polynomial
    chunk: ChunkMarks | None
    evaluation: tuple[Polynomial, ...]


@dataclass(frozen=True, eq=False, slots=True)
class HeadPass:
    """The final norm, the head and the loss as births and deaths.

    Attributes:
        sizes: Bytes of each tensor, by its number; the last layer's output is number 0, which is there already.
        forward: What happens on the way forward.
        backward: What happens on the way back.
        outgoing: The gradient of the last layer's output; -1 where it wants none.
        lasting: What is alive afterwards: logits that the loop holds.
    """

    sizes: tuple[Polynomial, ...]
    forward: Events
    backward: Events
    outgoing: int
    lasting: tuple[int, ...]


@lru_cache(maxsize=256)
def head_pass(shape: ModelShape, traits: LayerTraits, loss: Loss, input_wants_gradient: bool = True) -> HeadPass:
    """Run final norm, head and loss over the last layer's output `[batch, seq, hidden]`, forward and backward.

    Args:
        shape: The model.
        traits: How its layers are computed.
        loss: How the loss is made.
        input_wants_gradient: Whether layers go backward as well.
    """
    tape, source = Tape(), list[Tensor]()
    run = traits.modules(tape, shape)
    node = tape.node() if input_wants_gradient else None
    if node is not None:
        node.keeps = source
    value = _forward(run, loss, tape.given(Polynomial(per_token=shape.hidden), traits.arithmetic.residual, node))
    forward, before, after = tape.take(value.node), Events(), Events()
    if value.node is not None:  # else only a head taken in chunks is trained, whose backward is not on this tape
        before, after = run_backward(tape, value.node, tape.given(NOTHING, 4))
    run.end()
    for gradient in run.gradients:
        tape.release(gradient)  # of an adapted head; `stages` counts the gradients that stay
    backward = (*before, *after, *tape.take())
    outgoing = source[0].number if source else -1
    return HeadPass(tuple(tape.sizes), forward, backward, outgoing, tuple(x.number for x in run.lasting))


@lru_cache(maxsize=256)
def head_marks(shape: ModelShape, traits: LayerTraits, loss: Loss, input_wants_gradient: bool = True) -> HeadMarks:
    """Return the marks around the final norm, the head and the loss that can be the highest.

    Args:
        shape: The model.
        traits: How its layers are computed.
        loss: How the loss is made.
        input_wants_gradient: Whether layers go backward as well.
    """
    passed = head_pass(shape, traits, loss, input_wants_gradient)
    ahead = marks(passed.forward, passed.sizes, passed.sizes[0])
    back = marks(passed.backward, passed.sizes, alive_after(passed.forward, passed.sizes, passed.sizes[0]))
    forward = evaluation = uncovered(ahead)
    # The loss is born last: what is alive then stands around the chunks that it is made of.
    around = ahead[-1] if loss.in_chunks else NOTHING
    if not loss.in_chunks:
        tape = Tape(records=False)
        given = tape.given(Polynomial(per_token=shape.hidden), traits.arithmetic.residual)
        _forward(traits.modules(tape, shape), loss, given)
        evaluation = uncovered(marks(tape.take(), tape.sizes, given.bytes))
    trained = isinstance(loss, ChunkedLoss) and loss.recomputed
    chunk = _chunk_marks(shape, traits, around) if trained else None
    return HeadMarks(forward, uncovered(back), around, chunk, evaluation)


def _forward(run: Modules, loss: Loss, x: Tensor) -> Tensor:
    """Return the loss of the last layer's output, which nobody but the final norm holds."""
    hidden = run.norm(run.shape.groups[-1].layer, x)
    value = loss.forward(run, hidden)
    run.tape.named(hidden)
    return value


def logits_of(run: Modules, hidden: Tensor) -> Tensor:
    """Return logits `[batch, seq, vocabulary]`."""
    arithmetic, shape = run.traits.arithmetic, run.shape
    if arithmetic.autocast and arithmetic.weights > arithmetic.compute and HEAD not in run.traits.adapter.whole:
        # A head held in fp32 is cast to 16 bits by autocast, and that copy is what the product saves.
        run.keep_beside(Tensor(run.tape, Polynomial(fixed=shape.vocabulary * shape.hidden), arithmetic.compute))
    logits = run.head(hidden)
    if shape.scaled_logits:
        logits = op.scale(logits)
    return _capped(run, logits)


def _capped(run: Modules, logits: Tensor) -> Tensor:
    """Return logits within the model's soft cap, where it has one."""
    if not run.shape.logit_softcap:
        return logits
    capped = op.scale(op.activate_saving_result(op.scale(logits)))
    run.tape.named(logits)
    return capped


def cross_entropy(logits: Tensor) -> Tensor:
    """Return the cross-entropy: log-softmax saves its result, and so does the loss that reads it."""
    scores = op.activate_saving_result(logits)
    loss = op.result_of((scores,), NOTHING, 4, (op.gradient_like(scores),), (scores,))
    logits.tape.named(logits)
    return loss


def chunked(hidden: Tensor) -> Tensor:
    """Return the loss of a head taken in chunks: labelled rows are picked, their gradient is made at once and saved.

    The rows are gone when the chunks are done.
    """
    rows = op.gather(hidden, 1)
    gradient = Tensor(rows.tape, rows.elements, rows.itemsize)
    return op.result_of((rows,), NOTHING, 4, (None,), (gradient,))


def _recomputed_rows(hidden: Tensor) -> Tensor:
    """Return the loss of a trained head taken in chunks: the rows are saved.

    The gradient of each chunk's rows is a zero-filled tensor of all rows, added to that of the chunks before.
    """
    rows = op.gather(hidden, 1)
    return op.result_of((rows,), NOTHING, 4, (op.gradient_like(rows),), (rows,), works=(rows.bytes,))


def _chunk_marks(shape: ModelShape, traits: LayerTraits, around: Polynomial) -> ChunkMarks:
    """Run a chunk as studio/jobs/train/head.py does: forward without a graph, then again with one, and backward."""
    copy, compute, whole_itemsize = NOTHING, traits.arithmetic.compute, traits.adapter.whole_itemsize
    if HEAD in traits.adapter.whole and traits.arithmetic.autocast and compute < whole_itemsize:
        # Autocast's 16-bit copy of the weight is one for all chunks: its gradient is summed up and cast at the end.
        traits = replace(traits, adapter=replace(traits.adapter, whole_itemsize=compute))
        copy = Polynomial(fixed=shape.vocabulary * shape.hidden * compute)
    tape = Tape(records=False)
    _chunk_loss(traits.modules(tape, shape))
    forward = [mark.plus(copy) for mark in marks(tape.take(), tape.sizes)]
    tape = Tape()
    value = _chunk_loss(traits.modules(tape, shape))
    assert value.node is not None  # noqa: S101  the rows want a gradient
    again, late = tape.take(value.node), range(tape.saved_until, len(tape.sizes))
    backward = run_backward(tape, value.node, tape.given(NOTHING, 4))
    found = marks(recomputed(again, backward, late), tape.sizes)
    if HEAD in traits.adapter.whole:
        weights = Polynomial(fixed=shape.vocabulary * shape.hidden)
        sums = weights.times(traits.adapter.whole_itemsize).plus(copy)
        found = [mark.plus(sums) for mark in found]
        found.append(weights.times(compute + whole_itemsize))
    rows = Polynomial(per_token=shape.hidden * traits.arithmetic.residual)
    return ChunkMarks(uncovered(forward), around, uncovered(found), rows.times(2))


def _chunk_loss(run: Modules) -> Tensor:
    """Return the loss of one chunk, whose rows are a view."""
    tape, elements = run.tape, Polynomial(per_token=run.shape.hidden)
    node = tape.node() if tape.records else None
    rows = Tensor(tape, elements, run.traits.arithmetic.residual, node, base=Tensor(tape, NOTHING, 1))
    logits = _capped(run, op.scale(op.cast(run.head(rows), 4)))
    return cross_entropy(logits)
