"""A training step as forms: worked out once for a model and a way to compute it, then only numbers are put in."""

from dataclasses import dataclass, replace
from functools import lru_cache

from studio.core.shape import ModelShape
from studio.core.vram.decoder_layer import decoder_layer
from studio.core.vram.form import NOTHING, Form, total, uncovered
from studio.core.vram.head import HeadMarks, LossForm, head_forward, head_pass
from studio.core.vram.modules import LayerForm, Run, held_apart
from studio.core.vram.tape import Node, Tape, Tensor, run_backward


@dataclass(frozen=True, slots=True)
class GroupForms:
    """One kind of layer.

    Attributes:
        count: How many of them.
        kept: Bytes that each keeps from its forward until its backward.
        forward: High-water marks inside one layer's forward, beside what earlier layers keep.
        backward: High-water marks inside one layer's backward (recomputation included), beside what earlier layers
            keep.
    """

    count: int
    kept: Form
    forward: tuple[Form, ...]
    backward: tuple[Form, ...]


@dataclass(frozen=True, eq=False, slots=True)
class LayersForms:
    """High-water marks of a micro-batch in its layers, beside the static part.

    Attributes:
        kept: What all layers keep from their forward until their backward.
        checkpoint: What one keeps.
        forward: Marks of any layer's forward, beside what it and others keep.
        blocks: The part of them that never falls when a batch, a length or a rank grows.
        backward: Marks of any layer's backward, beside what it and others keep.
        first_backward: Marks of the layer that goes backward last, beside nothing but itself: where its input wants no
            gradient it saves and makes less.
        evaluation: Marks of any layer's forward without a graph and without dropout, beside nothing.
    """

    kept: Form
    checkpoint: Form
    forward: tuple[Form, ...]
    blocks: tuple[Form, ...]
    backward: tuple[Form, ...]
    first_backward: tuple[Form, ...]
    evaluation: tuple[Form, ...]


@lru_cache(maxsize=256)
def layers_forms(
    shape: ModelShape, form: LayerForm, grad_checkpointing: bool, input_wants_gradient: bool
) -> LayersForms:
    """Return the forms of a step's layers; cached, since sliders of batch, length and rank do not change them.

    Args:
        shape: The model.
        form: How a layer is computed.
        grad_checkpointing: Whether layers are computed again in the backward.
        input_wants_gradient: Whether the embeddings' output asks for a gradient (stock peft makes it, under
            checkpointing), so that the first layer goes backward like the others.
    """
    work = _checkpointed if grad_checkpointing else _kept_whole
    groups = tuple(work(shape, form, index) for index in range(len(shape.groups)))
    spared, first = NOTHING, groups[0].backward
    if grad_checkpointing and not input_wants_gradient:
        first = _recomputed(shape, form, 0, wants_gradient=False)
    elif not grad_checkpointing:
        # Embeddings want no gradient, so that the first layer saves nothing before its first adapter.
        kept, _, first = _kept(shape, form, 0, wants_gradient=input_wants_gradient)
        spared = groups[0].kept.minus(kept)
    if grad_checkpointing and not form.adapter.dropout and held_apart(form) is None:
        evaluation = uncovered(mark for group in groups for mark in group.forward)
    else:
        evaluation = _evaluated(shape, form)
    forward = uncovered(mark.minus(group.kept) for group in groups for mark in group.forward)
    return LayersForms(
        kept=total(group.kept.times(group.count) for group in groups).minus(spared),
        checkpoint=groups[0].kept,
        forward=forward,
        blocks=uncovered(mark.at_least_nothing() for mark in forward),
        backward=uncovered(mark.minus(group.kept) for group in groups for mark in group.backward),
        first_backward=first,
        evaluation=evaluation,
    )


@lru_cache(maxsize=256)
def head_forms(shape: ModelShape, form: LayerForm, loss: LossForm) -> HeadMarks:
    """Return the marks around the final norm, the head and the loss that can be the highest.

    Args:
        shape: The model.
        form: How its layers are computed.
        loss: How the loss is made.
    """
    tape = Tape()
    marks = head_pass(Run(tape, shape, form), loss, _input(tape, shape, form))
    forward = evaluation = uncovered(marks.forward)
    if loss.kind != "chunked":
        tape = Tape(records=False)
        head_forward(Run(tape, shape, form), loss, [_input(tape, shape, form)])
        evaluation = uncovered(tape.marks)
    return replace(marks, forward=forward, backward=uncovered(marks.backward), evaluation=evaluation)


def _input(tape: Tape, shape: ModelShape, form: LayerForm, *, wants_gradient: bool = True) -> Tensor:
    node = Node(tape.next_sequence(), (), ()) if wants_gradient else None
    return Tensor(tape, Form(per_token=shape.hidden), form.arithmetic.residual, node)


def _checkpointed(shape: ModelShape, form: LayerForm, index: int) -> GroupForms:
    """Only the layer's input stays; the layer is computed again while the gradient of its output waits."""
    held = held_apart(form)
    forward, kept = _without_graph(shape, form, index, held)
    backward = _recomputed(shape, form, index)
    if held:
        # What was held since the forward goes piece by piece while the layer goes backward.
        apart = kept.minus(Form(per_token=shape.hidden * form.arithmetic.residual))
        backward = tuple(mark.plus(apart) for mark in backward)
    return GroupForms(shape.groups[index].count, kept, forward, backward)


def _without_graph(
    shape: ModelShape, form: LayerForm, index: int, held: list[Tensor] | None = None
) -> tuple[tuple[Form, ...], Form]:
    """Return the marks of a layer's forward that keeps no graph, its input included, and the bytes that stay."""
    tape = Tape(records=False)
    x = _input(tape, shape, form)
    out = decoder_layer(Run(tape, shape, form, held=held), shape.groups[index].layer, x)
    del out
    return uncovered(tape.marks), tape.live if held else x.bytes


def _evaluated(shape: ModelShape, form: LayerForm) -> tuple[Form, ...]:
    """Return the marks of any layer's forward in an evaluation."""
    form = replace(form, adapter=replace(form.adapter, dropout=False))
    every = range(len(shape.groups))
    return uncovered(mark for index in every for mark in _without_graph(shape, form, index)[0])


def _recomputed(shape: ModelShape, form: LayerForm, index: int, *, wants_gradient: bool = True) -> tuple[Form, ...]:
    tape = Tape()
    run = Run(tape, shape, form, held=held_apart(form))
    x = _input(tape, shape, form, wants_gradient=wants_gradient)
    gradient = [Tensor(tape, x.elements, x.itemsize)]
    out = decoder_layer(run, shape.groups[index].layer, x)
    # torch.utils.checkpoint stops a recomputation as soon as everything is saved again (early_stop). Its older kind
    # computes again before anything else, whole, and holds output and gradient until the layer has gone backward.
    recomputing = tape.marks[: None if form.reentrant else tape.marks_at_last_saving]
    tape.marks.clear()
    node, out.node = out.node, None
    held = [out, *gradient] if form.reentrant else []
    del out
    assert node is not None  # noqa: S101  the input wants a gradient
    in_flight = run_backward(tape, node, gradient)
    if held:
        in_flight = NOTHING
    del held
    return uncovered([*(mark.plus(in_flight) for mark in recomputing), *tape.marks])


def _kept_whole(shape: ModelShape, form: LayerForm, index: int) -> GroupForms:
    """Everything that a layer saved stays until its backward."""
    kept, forward, backward = _kept(shape, form, index, wants_gradient=True)
    return GroupForms(shape.groups[index].count, kept, forward, backward)


def _kept(
    shape: ModelShape, form: LayerForm, index: int, *, wants_gradient: bool
) -> tuple[Form, tuple[Form, ...], tuple[Form, ...]]:
    tape = Tape()
    run = Run(tape, shape, form)
    x = _input(tape, shape, form, wants_gradient=wants_gradient)
    out = decoder_layer(run, shape.groups[index].layer, x)
    forward = uncovered(tape.marks)
    del x
    kept = tape.live.minus(out.bytes)
    tape.marks.clear()
    gradient = [Tensor(tape, out.elements, out.itemsize)]
    node, out.node = out.node, None
    del out
    assert node is not None  # noqa: S101  adapters want gradients
    run_backward(tape, node, gradient)
    return kept, forward, uncovered(tape.marks)
