"""The end of the model: final norm, head and loss, forward and backward.

Sources: transformers/loss/loss_utils.py ForCausalLMLoss, studio/jobs/train/head.py, liger_kernel
fused_linear_cross_entropy.
"""

from dataclasses import dataclass, replace
from typing import Literal

from studio.core.shape import Linear
from studio.core.trainable import HEAD
from studio.core.vram import operators as op
from studio.core.vram.decoder_layer import norm
from studio.core.vram.modules import Run, linear
from studio.core.vram.polynomial import NOTHING, Polynomial, uncovered
from studio.core.vram.tape import Node, Tape, Tensor, run_backward

LossKind = Literal["model", "whole", "chunked"]

_OWN_LOSS = frozenset({"bloom", "falcon", "gpt_bigcode", "gpt_neox", "stablelm"})
"""Families that shifted logits and called a loss themselves (read in modeling_*.py of 4.45.2 and 4.48.1)."""


@dataclass(frozen=True, slots=True)
class LossForm:
    """How the loss is made.

    Attributes:
        kind: `model`: transformers' own, whole logits. `whole`: our loop's whole logits. `chunked`: a head that is
            never whole.
        outputs_kept: Whether the loop holds the model's outputs, and so the logits, while it runs the backward.
        upcast_outputs: Whether those logits are fp32 already (transformers up to 4.45: `logits = logits.float()`).
        shift_copied: Whether the fp32 logits are copied to drop the last token of several rows (transformers up to
            4.48: `logits[..., :-1, :].contiguous()`; later the labels are shifted instead).
        overwrites: Whether one kernel makes the loss of the fp32 logits and writes their gradient over them.
        by_model: Whether models that bring a loss of their own still use it (transformers up to 4.48): it leaves the
            logits in the head's format.
        recomputed: Whether the head is trained, so that each chunk is computed again in the backward (our loop).
    """

    kind: LossKind
    outputs_kept: bool = False
    upcast_outputs: bool = False
    shift_copied: bool = False
    overwrites: bool = False
    by_model: bool = False
    recomputed: bool = False


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
    around_chunk: Polynomial = NOTHING
    chunk: ChunkMarks | None = None
    evaluation: tuple[Polynomial, ...] = ()


def head_pass(run: Run, loss: LossForm, x: Tensor) -> HeadMarks:
    """Run final norm, head and loss over the last layer's output `[batch, seq, hidden]`."""
    tape, given = run.tape, [x]
    del x
    value, outputs, kept = head_forward(run, loss, given)
    around_chunk = tape.marks[-1] if loss.kind == "chunked" else NOTHING
    forward = tuple(tape.marks)
    tape.start_marks()
    node, value.node = value.node, None
    assert node is not None  # noqa: S101  the input wants a gradient
    run_backward(tape, node, [Tensor(tape, NOTHING, 4)])
    del outputs, kept
    chunk = _chunk_marks(run, around_chunk) if loss.recomputed else None
    return HeadMarks(forward, tuple(tape.marks), around_chunk, chunk)


def head_forward(
    run: Run, loss: LossForm, x: list[Tensor], *, shifted: float = 1.0
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the loss, the logits where the loop holds them, and what the head keeps beside its weight.

    Args:
        run: The pass.
        loss: How the loss is made.
        x: The last layer's output in a list, which is emptied so that nobody else holds it.
        shifted: Share of the logits that is left when the last token of each row is dropped.
    """
    hidden = norm(run, run.shape.groups[-1].layer, x[0])
    x.clear()
    if loss.kind == "chunked":
        return (_recomputed_rows(hidden) if loss.recomputed else _chunked(hidden)), None, []
    logits, kept = _logits(run, hidden)
    if loss.kind == "whole":
        given = [logits]
        del logits
        return _cross_entropy(_widened(given)), None, kept
    if loss.by_model and run.shape.family in _OWN_LOSS:
        value = _own_loss(run, logits, loss, shifted)
    else:
        if loss.upcast_outputs:
            logits = op.cast(logits, 4)
        value = _whole_loss(logits, loss, shifted)
    if loss.kind == "model" and run.form.arithmetic.autocast and not loss.outputs_kept:
        # accelerate gives the outputs of an autocast forward back in fp32 (ConvertOutputsToFp32).
        op.cast(logits, 4)
    return value, logits if loss.outputs_kept else None, kept


def _logits(run: Run, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return logits `[batch, seq, vocabulary]` and what the head keeps beside its weight."""
    arithmetic, shape = run.form.arithmetic, run.shape
    kept = []
    if arithmetic.autocast and arithmetic.weights > arithmetic.compute and HEAD not in run.form.adapter.whole:
        # A head upcast to fp32 is cast back to 16 bits by autocast, and that copy is what the product saves.
        kept.append(Tensor(run.tape, Polynomial(fixed=shape.vocabulary * shape.hidden), arithmetic.compute))
    logits = _head(run, hidden)
    if shape.scaled_logits:
        logits = op.scale(logits)
    if shape.logit_softcap:
        logits = op.scale(op.activate_saving_result(op.scale(logits)))
    return logits, kept


def _head(run: Run, hidden: Tensor) -> Tensor:
    """Return the head's product; the head is never quantised, but may be adapted or trained whole."""
    layer, arithmetic = Linear(HEAD, run.shape.hidden, run.shape.vocabulary), run.form.arithmetic
    if HEAD in run.form.adapter.targets | run.form.adapter.whole:
        return linear(replace(run, form=replace(run.form, quantised="")), layer, hidden)
    return op.frozen_linear(
        hidden, Polynomial(per_token=layer.outputs), arithmetic.compute if arithmetic.autocast else None
    )


def _whole_loss(logits: Tensor, loss: LossForm, shifted_share: float) -> Tensor:
    """Return the loss of logits that are made fp32 first, as transformers' own loss function does."""
    wide = op.cast(logits, 4)
    shifted = op.clone(op.slice_last(wide, shifted_share)) if loss.shift_copied else wide
    return _overwritten(shifted) if loss.overwrites else _cross_entropy(shifted)


def _widened(logits: list[Tensor]) -> Tensor:
    """Return logits in fp32; nobody else holds the narrow ones (`logits.float()` of studio/jobs/train/head.py)."""
    return op.cast(logits.pop(), 4)


def _own_loss(run: Run, logits: Tensor, loss: LossForm, shifted_share: float) -> Tensor:
    """Return the loss of models that bring their own: the copy is of the head's format, and autocast widens it."""
    shifted = op.clone(op.slice_last(logits, shifted_share)) if loss.shift_copied else logits
    if loss.overwrites:
        return _overwritten(shifted)
    return _cross_entropy(op.cast(shifted, 4) if run.form.arithmetic.autocast else shifted)


def _overwritten(logits: Tensor) -> Tensor:
    """Return a loss whose gradient is written over the logits that it saved."""
    return Tensor(logits.tape, NOTHING, 4, op.node_of(logits.tape, (logits,), (0,), (logits,)))


def _cross_entropy(logits: Tensor) -> Tensor:
    """Return the cross-entropy: log-softmax saves its result, and so does the loss that reads it."""
    scores = op.activate_saving_result(logits)
    return Tensor(
        logits.tape,
        NOTHING,
        4,
        op.node_of(logits.tape, (scores,), ((scores.elements, scores.itemsize),), (scores,)),
    )


def _chunked(hidden: Tensor) -> Tensor:
    """Return the loss of a head taken in chunks: labelled rows are picked, their gradient is made at once and saved.

    The rows are gone when the chunks are done.
    """
    rows = op.gather(hidden, 1)
    gradient = Tensor(rows.tape, rows.elements, rows.itemsize)
    return Tensor(rows.tape, NOTHING, 4, op.node_of(rows.tape, (rows,), (None,), (gradient,)))


def _recomputed_rows(hidden: Tensor) -> Tensor:
    """Return the loss of a trained head taken in chunks: the rows are saved.

    The gradient of each chunk's rows is a zero-filled tensor of all rows, added to that of the chunks before.
    """
    rows = op.gather(hidden, 1)
    works = (rows.bytes,)
    return Tensor(
        rows.tape, NOTHING, 4, op.node_of(rows.tape, (rows,), ((rows.elements, rows.itemsize),), (rows,), works)
    )


def _chunk_marks(run: Run, around: Polynomial) -> ChunkMarks:
    """Run a chunk as studio/jobs/train/head.py does: forward without a graph, then again with one, and backward."""
    shape, form = run.shape, run.form
    copy, compute = NOTHING, form.arithmetic.compute
    if HEAD in form.adapter.whole and form.arithmetic.autocast and compute < form.adapter.whole_itemsize:
        # Autocast's 16-bit copy of the weight is one for all chunks: its gradient is summed up and cast at the end.
        form = replace(form, adapter=replace(form.adapter, whole_itemsize=compute))
        copy = Polynomial(fixed=shape.vocabulary * shape.hidden * compute)
    tape = Tape(records=False)
    _chunk_loss(Run(tape, shape, form))
    forward = [mark.plus(copy) for mark in tape.marks]
    tape = Tape()
    again = Run(tape, shape, form)
    value = _chunk_loss(again)
    recomputing = tape.marks[: tape.marks_at_last_saving]
    tape.marks.clear()
    node, value.node = value.node, None
    assert node is not None  # noqa: S101  the rows want a gradient
    in_flight = run_backward(tape, node, [Tensor(tape, NOTHING, 4)])
    marks = [*(mark.plus(in_flight) for mark in recomputing), *tape.marks]
    if HEAD in form.adapter.whole:
        weights = Polynomial(fixed=shape.vocabulary * shape.hidden)
        sums = weights.times(form.adapter.whole_itemsize).plus(copy)
        marks = [mark.plus(sums) for mark in marks]
        marks.append(weights.times(compute + run.form.adapter.whole_itemsize))
    rows = Polynomial(per_token=shape.hidden * form.arithmetic.residual)
    return ChunkMarks(uncovered(forward), around, uncovered(marks), rows.times(2))


def _chunk_loss(run: Run) -> Tensor:
    """Return the loss of one chunk, whose rows are a view."""
    tape, shape = run.tape, run.shape
    node = Node(tape.next_sequence(), (), ()) if tape.records else None
    elements = Polynomial(per_token=shape.hidden)
    rows = Tensor(tape, elements, run.form.arithmetic.residual, node, base=Tensor(tape, NOTHING, 1))
    logits = op.scale(op.cast(_head(run, rows), 4))
    if shape.logit_softcap:
        logits = op.scale(op.activate_saving_result(op.scale(logits)))
    return _cross_entropy(logits)
