"""A micro-batch before its numbers are known: which polynomials describe its layers, its head and what they share.

They are worked out once for a model and a way to compute it; then only numbers are put in.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from studio.core.shape import ModelShape
from studio.core.trainable import HEAD, target_names
from studio.core.vram.decoder_layer import decoder_layer
from studio.core.vram.fused import check_kernels
from studio.core.vram.head import HeadMarks, LossForm, head_forward, head_pass
from studio.core.vram.modules import AdapterForm, Kernel, LayerForm, Run, held_apart
from studio.core.vram.operators import Arithmetic
from studio.core.vram.polynomial import NOTHING, Heights, Polynomial, heights, total, uncovered
from studio.core.vram.setup import Setup
from studio.core.vram.stock import (
    COPIES_LOGITS,
    NEWEST,
    REENTRANT_BELOW,
    SHIFT_COPIED_BELOW,
    UPCAST_BELOW,
    copying_logits,
    repeats_heads,
    version_of,
)
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
    kept: Polynomial
    forward: tuple[Polynomial, ...]
    backward: tuple[Polynomial, ...]


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

    kept: Polynomial
    checkpoint: Polynomial
    forward: tuple[Polynomial, ...]
    blocks: tuple[Polynomial, ...]
    backward: tuple[Polynomial, ...]
    first_backward: tuple[Polynomial, ...]
    evaluation: tuple[Polynomial, ...]


@lru_cache(maxsize=256)
def layers_forms(
    shape: ModelShape, form: LayerForm, grad_checkpointing: bool, input_wants_gradient: bool
) -> LayersForms:
    """Return the polynomials of a step's layers; cached, since sliders of batch, length and rank do not change them.

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
    return Tensor(tape, Polynomial(per_token=shape.hidden), form.arithmetic.residual, node)


def _checkpointed(shape: ModelShape, form: LayerForm, index: int) -> GroupForms:
    """Only the layer's input stays; the layer is computed again while the gradient of its output waits."""
    held = held_apart(form)
    forward, kept = _without_graph(shape, form, index, held)
    backward = _recomputed(shape, form, index)
    if held:
        # What was held since the forward goes piece by piece while the layer goes backward.
        apart = kept.minus(Polynomial(per_token=shape.hidden * form.arithmetic.residual))
        backward = tuple(mark.plus(apart) for mark in backward)
    return GroupForms(shape.groups[index].count, kept, forward, backward)


def _without_graph(
    shape: ModelShape, form: LayerForm, index: int, held: list[Tensor] | None = None
) -> tuple[tuple[Polynomial, ...], Polynomial]:
    """Return the marks of a layer's forward that keeps no graph, its input included, and the bytes that stay."""
    tape = Tape(records=False)
    x = _input(tape, shape, form)
    out = decoder_layer(Run(tape, shape, form, held=held), shape.groups[index].layer, x)
    del out
    return uncovered(tape.marks), tape.live if held else x.bytes


def _evaluated(shape: ModelShape, form: LayerForm) -> tuple[Polynomial, ...]:
    """Return the marks of any layer's forward in an evaluation."""
    form = replace(form, adapter=replace(form.adapter, dropout=False))
    every = range(len(shape.groups))
    return uncovered(mark for index in every for mark in _without_graph(shape, form, index)[0])


def _recomputed(
    shape: ModelShape, form: LayerForm, index: int, *, wants_gradient: bool = True
) -> tuple[Polynomial, ...]:
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
) -> tuple[Polynomial, tuple[Polynomial, ...], tuple[Polynomial, ...]]:
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


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """A micro-batch of a kind of loop, before its numbers are known.

    Attributes:
        layers: Its layers.
        head: Its head and loss.
        copying: The same loop in versions of transformers that copy the logits, where the version is not known.
        shared_per_token: What all layers share, in bytes per token.
        shared_per_position: The same per token of a row, however many rows there are.
        mask_itemsize: Bytes per entry of an S x S mask.
        cache_per_token: What a cache keeps that nobody reads.
        held_per_token: Logits that the loop itself holds.
        offloads: Whether checkpoints wait in host memory.
    """

    layers: LayersForms
    head: HeadMarks
    copying: "MicroBatch | None"
    shared_per_token: int
    shared_per_position: int
    mask_itemsize: int
    cache_per_token: int
    held_per_token: int
    offloads: bool

    @lru_cache(maxsize=256)  # noqa: B019  micro-batches are cached too
    def of_rank(self, rank: int) -> Heights:
        """Return its high-water marks for a rank: seven sets of the layers, three of each head."""
        layers = self.layers
        sets = [(layers.kept,), (layers.checkpoint,), layers.forward, layers.blocks]
        sets += [layers.backward, layers.first_backward, layers.evaluation]
        for head in (self.head, self.copying.head) if self.copying else (self.head,):
            sets += [head.forward, head.backward, head.evaluation]
        return heights(sets, rank)


@lru_cache(maxsize=256)
def micro_batch(shape: ModelShape, kind: Setup, kernel: Kernel) -> MicroBatch:
    """Return the micro-batch of a model, a kind of set-up and an attention kernel."""
    form = layer_form(shape, kind, kernel)
    unsaid = kind.engine == "hf" and kind.loss == "full" and not kind.transformers and kind.micro_batch > 1
    return MicroBatch(
        layers=layers_forms(shape, form, kind.grad_checkpointing, input_wants_gradient(kind)),
        head=head_forms(shape, form, loss_form(kind)),
        copying=micro_batch(shape, copying_logits(kind), kernel) if unsaid else None,
        shared_per_token=_shared_per_token(shape, kind),
        shared_per_position=2 * shape.head_dim * kind.residual_itemsize,  # cos and sin
        mask_itemsize=1 if kernel == "efficient_masked" else kind.residual_itemsize,
        cache_per_token=_cache_per_token(shape, kind),
        held_per_token=_held_per_token(shape, kind),
        offloads=kind.offload_checkpoints and kind.grad_checkpointing and kind.device == "cuda",
    )


def input_wants_gradient(setup: Setup) -> bool:
    """Whether the embeddings' output asks for a gradient: stock peft makes it, under checkpointing."""
    return (setup.engine == "hf" and setup.grad_checkpointing) or setup.adapted.trains_embedding


def layer_form(shape: ModelShape, setup: Setup, kernel: Kernel) -> LayerForm:
    """Return how a kind of set-up computes the layers of a model."""
    ours = setup.engine == "studio"
    residual = _residual_itemsize(shape, setup)
    arithmetic = Arithmetic(setup.compute_itemsize, residual, setup.autocast, setup.embedding_itemsize)
    adapter = AdapterForm(
        targets=target_names(shape, setup.targets),
        dropout=setup.dropout > 0,
        dora=setup.dora,
        casts_inputs=not (ours and setup.autocast),
        whole=setup.adapted.whole_names,
        whole_itemsize=4 if ours else residual,
    )
    quantised = setup.quant_type if setup.quantised else ""
    check_kernels(shape, setup.fused_kernels, fused_loss=setup.loss != "full")
    return LayerForm(
        arithmetic,
        adapter,
        quantised,
        kernel,
        setup.micro_batch > 1,
        half=setup.dtype == "fp16",
        cpu=setup.device == "cpu",
        fused_kernels=setup.fused_kernels,
        reentrant=not ours and version_of(setup.transformers or NEWEST) < REENTRANT_BELOW,
        repeats_heads=shape.repeats_heads or (not ours and repeats_heads(shape, setup)),
        plain_attention=runs_plain(shape, setup, kernel),
    )


def _residual_itemsize(shape: ModelShape, setup: Setup) -> int:
    """Return the bytes per element of the residual stream.

    CUDA's autocast gives layer norms back in fp32, and quantised layers give back what they are given.
    """
    widened = setup.quantised and setup.autocast and setup.device == "cuda" and shape.groups[0].layer.norm == "layer"
    return 4 if widened else setup.residual_itemsize


def runs_plain(shape: ModelShape, setup: Setup, kernel: Kernel) -> bool:
    """Whether torch has no fused kernel: for fewer key than query heads it has, but must be told (`enable_gqa`).

    Falcon's own attention does not tell (modeling_falcon.py, ATen/native/transformers/sdp_utils_cpp.h
    check_batch_size_and_num_heads_dense).
    """
    shares = shape.own_attention and shape.kv_heads == 1 < shape.heads
    return shares and kernel != "eager" and setup.attention != "flash_attention_2"


@lru_cache(maxsize=256)
def loss_form(setup: Setup) -> LossForm:
    """Return how a kind of set-up makes its loss; a version of transformers that is not said counts as the newest."""
    if setup.loss != "full":
        return LossForm("chunked", recomputed=setup.engine == "studio" and _head_trained(setup))
    if setup.engine == "studio":
        return LossForm("whole")
    version = version_of(setup.transformers or NEWEST)
    return LossForm(
        "model",
        setup.outputs_kept,
        upcast_outputs=version < UPCAST_BELOW,
        shift_copied=(version < SHIFT_COPIED_BELOW or setup.fused_kernels == "foak") and setup.micro_batch > 1,
        overwrites=setup.fused_kernels == "foak",
        by_model=version < SHIFT_COPIED_BELOW,
    )


def _head_trained(setup: Setup) -> bool:
    """Whether the head is adapted or trained whole."""
    names = (setup.targets,) if isinstance(setup.targets, str) else setup.targets
    return setup.adapted.trains_head or any(name.rpartition(".")[2] == HEAD for name in names)


def _shared_per_token(shape: ModelShape, kind: Setup) -> int:
    """Return what all layers share for every token, in bytes: ids, labels and mask (int64), and odd embeddings."""
    # Embeddings that went back to 16 bit make the first layer's input narrower than all others, and so does a stream
    # that widens on its way through the layers, where no norm of the embedding has widened it before.
    narrower = kind.residual_itemsize - kind.embedding_itemsize
    widens = kind.grad_checkpointing * (_residual_itemsize(shape, kind) - kind.residual_itemsize)
    narrower += 0 if shape.embedding_norm else widens
    # An embedding's output that asks for a gradient lives until it has one; where the model alters it first, it is not
    # what the first checkpoint keeps.
    wants = kind.engine == "hf" and kind.grad_checkpointing
    leaf = kind.embedding_itemsize * shape.hidden * (wants and shape.alters_embedding)
    # What a dropout and a norm of it save for that gradient: a mask, and the fp32 copy that autocast makes.
    mask = (1 if kind.device == "cuda" else kind.residual_itemsize) * (wants and shape.embedding_dropout)
    copy = 4 * (wants and shape.embedding_norm and widens > 0)
    return 3 * 8 + leaf + (mask + copy - narrower) * shape.hidden


def _cache_per_token(shape: ModelShape, kind: Setup) -> int:
    """Return what GPTBigCode keeps for a cache that nobody reads, until its outputs go, in bytes per token.

    Under checkpointing it alone leaves `use_cache` on, and the keys and values that it keeps are views of all that
    c_attn gave (modeling_gpt_bigcode.py of transformers 4.45.2; 5 turns it off for every model).
    """
    old = version_of(kind.transformers or COPIES_LOGITS) < REENTRANT_BELOW
    if shape.family != "gpt_bigcode" or kind.engine == "studio" or not kind.grad_checkpointing or not old:
        return 0
    wide = 4 if kind.quantised and kind.autocast else kind.residual_itemsize
    return wide * sum(group.count * linear.outputs for group in shape.groups for linear in group.layer.qkv)


def _held_per_token(shape: ModelShape, kind: Setup) -> int:
    """Logits that a loop's own `outputs` keeps alive through backward and optimizer step, in bytes per token."""
    if not kind.outputs_kept or kind.loss != "full":
        return 0
    if loss_form(kind).upcast_outputs:
        return 4 * shape.vocabulary
    return (kind.compute_itemsize if kind.autocast else kind.residual_itemsize) * shape.vocabulary


def caches_copies(setup: Setup) -> bool:
    """Whether autocast caches 16-bit adapter copies until the forward ends; a kept graph holds them anyway."""
    cast_within = setup.fused_kernels == "foak" and setup.quantised  # its adapters never come to autocast's cache
    return setup.autocast and setup.compute_itemsize != 4 and setup.grad_checkpointing and not cast_within
