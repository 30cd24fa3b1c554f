"""What a micro-batch holds beside weights and states: kept activations, a layer at work, head and loss.

Which polynomials describe it is worked out once for a model and a way to compute it; then only numbers are put in.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from studio.core.loss_chunk import loss_chunk_tokens
from studio.core.shape import ModelShape
from studio.core.vram.decoder_layer import decoder_layer, first_adapted, layer_pass, recomputed_marks
from studio.core.vram.gemma import left_behind_keys
from studio.core.vram.head import HeadMarks, head_marks
from studio.core.vram.loop import Loop, at_size, mask_count, trains_layers
from studio.core.vram.modules import LayerTraits
from studio.core.vram.polynomial import NOTHING, Heights, Polynomial, heights, largest, total, uncovered
from studio.core.vram.setup import Setup
from studio.core.vram.tape import Tape, marks


@dataclass(frozen=True, eq=False, slots=True)
class LayerMarks:
    """High-water marks of a micro-batch in its layers, beside what is always there.

    Attributes:
        kept: What all layers keep from their forward until their backward.
        whole: What of it the layers keep that are not computed again.
        checkpoint: What the first layer keeps.
        forward: Marks of any layer's forward, beside what it and others keep.
        blocks: The same without negative terms, so that it never falls when a batch, a length or a rank grows.
        backward: Marks of any layer's backward (computing again included), beside what it and others keep.
        first_backward: Marks of the layer that goes backward last, with nothing beside it. Where its input wants no
            gradient, it saves and makes less.
        evaluation: Marks of any layer's forward without a graph and without dropout, beside nothing.
    """

    kept: Polynomial
    whole: Polynomial
    checkpoint: Polynomial
    forward: tuple[Polynomial, ...]
    blocks: tuple[Polynomial, ...]
    backward: tuple[Polynomial, ...]
    first_backward: tuple[Polynomial, ...]
    evaluation: tuple[Polynomial, ...]


@lru_cache(maxsize=256)
def layer_marks(shape: ModelShape, traits: LayerTraits, recomputed: int, input_wants_gradient: bool) -> LayerMarks:
    """Return the marks of all layers; cached, since sliders of batch, length and rank do not change them.

    Args:
        shape: The model.
        traits: How a layer is computed.
        recomputed: How many layers, from the first that goes backward, are computed again there. When they are, the
            others have let go of their activations; the last layers would make theirs again beside all others.
        input_wants_gradient: Whether the embeddings' output asks for a gradient.
    """
    # The backward ends at the first layer with an adapter; those before it keep nothing.
    lead = 0 if input_wants_gradient else first_adapted(shape, traits)
    ways, row = _ways(shape, lead + recomputed if recomputed else 0)
    passes = [layer_pass(shape, traits, kind, again, True) for kind, again in ways]
    kept = [one.kept for one in passes]
    # While a layer works, those after the last of its kind keep nothing yet, or nothing any more.
    free = [own.plus(later) for own, later in zip(kept, _kept_later(row, kept), strict=True)]
    ahead, back = [one.forward_marks() for one in passes], [one.backward_marks() for one in passes]
    formats, targets = traits.arithmetic, traits.adapter.targets
    left = left_behind_keys(shape, targets, (formats.compute, formats.residual), row, [again for _, again in ways])
    forward = uncovered(mark.minus(own) for marks_, own in zip(ahead, free, strict=True) for mark in marks_)
    order = row or shape.kinds
    number = order[lead]
    spared, first = total(kept[way] for way in order[:lead]), back[number]
    if not input_wants_gradient and recomputed:
        first = recomputed_marks(shape, traits, shape.kinds[lead])
    elif not input_wants_gradient:
        # Embeddings want no gradient, so that the first layer saves nothing before its first adapter.
        lone = layer_pass(shape, traits, number, False, input_wants_gradient)
        spared, first = spared.plus(kept[number].minus(lone.kept)), lone.backward_marks()
    # Where only inputs are kept and nothing is dropped, an evaluation's forward is the training's.
    as_trained = (
        all(again for _, again in ways) and not traits.adapter.dropout and kept[0] == passes[0].sizes[passes[0].source]
    )
    counts = Counter(order)
    return LayerMarks(
        kept=total(own.times(counts[way]) for way, own in enumerate(kept)).minus(spared),
        whole=total(kept[way].times(counts[way]) for way, (_, again) in enumerate(ways) if not again and recomputed),
        checkpoint=kept[number],
        forward=forward,
        blocks=uncovered(mark.at_least_nothing() for mark in forward),
        backward=uncovered(
            mark.minus(own).plus(more) for marks_, own, more in zip(back, free, left, strict=True) for mark in marks_
        ),
        first_backward=first,
        evaluation=uncovered(mark for marks_ in ahead for mark in marks_) if as_trained else _evaluated(shape, traits),
    )


def _ways(shape: ModelShape, edge: int) -> tuple[list[tuple[int, bool]], tuple[int, ...]]:
    """Return the ways in which layers go through a step, and of each layer the number of its way.

    A way is a kind of layer, and whether it is computed again. Where all are, or none is, ways are numbered as kinds
    are, and the order is empty where kinds follow each other.

    Args:
        shape: The model.
        edge: How many layers, from the first, are computed again.
    """
    if not 0 < edge < shape.layers:
        return [(kind, edge > 0) for kind in range(len(shape.groups))], shape.order
    each = [(kind, place < edge) for place, kind in enumerate(shape.kinds)]
    ways = list(dict.fromkeys(each))
    return ways, tuple(map(ways.index, each))


def _kept_later(order: tuple[int, ...], kept: list[Polynomial]) -> list[Polynomial]:
    """Return what the layers after the last one of each way keep; nothing where the order is empty."""
    later = [NOTHING] * len(kept)
    behind, seen = NOTHING, set[int]()
    for way in reversed(order):
        if way not in seen:
            seen.add(way)
            later[way] = behind
        behind = behind.plus(kept[way])
    return later


def _untouched(shape: ModelShape, traits: LayerTraits) -> LayerMarks:
    """Return the marks of layers through which no gradient flows: where the head alone is trained."""
    source = Polynomial(per_token=shape.stream * traits.arithmetic.residual)
    evaluation = uncovered(_evaluation_marks(shape, traits))
    forward = uncovered(mark.minus(source) for mark in evaluation)
    blocks = uncovered(mark.at_least_nothing() for mark in forward)
    return LayerMarks(source, NOTHING, source, forward, blocks, (), (), evaluation)


@lru_cache(maxsize=64)
def _evaluated(shape: ModelShape, traits: LayerTraits) -> tuple[Polynomial, ...]:
    """Return the marks of any layer's forward in an evaluation."""
    return uncovered(_evaluation_marks(shape, replace(traits, adapter=replace(traits.adapter, dropout=False))))


def _evaluation_marks(shape: ModelShape, traits: LayerTraits) -> Iterator[Polynomial]:
    for group in shape.groups:
        tape = Tape(records=False)
        x = tape.given(Polynomial(per_token=shape.stream), traits.arithmetic.residual)
        tape.hold(x)
        decoder_layer(traits.modules(tape, shape), group.layer, x)
        yield from marks(tape.take(), tape.sizes, x.bytes)


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    """The high-water marks of a micro-batch, before its numbers are known."""

    layers: LayerMarks
    head: HeadMarks

    @lru_cache(maxsize=256)  # noqa: B019  micro-batches are cached too
    def of_rank(self, rank: int) -> Heights:
        """Return the marks for a rank: eight sets of the layers, three of the head."""
        layers, head = self.layers, self.head
        sets = [(layers.kept,), (layers.whole,), (layers.checkpoint,), layers.forward, layers.blocks]
        sets += [layers.backward, layers.first_backward, layers.evaluation]
        return heights([*sets, head.forward, head.backward, head.evaluation], rank)


@lru_cache(maxsize=256)
def micro_batch(shape: ModelShape, loop: Loop) -> MicroBatch:
    """Return the micro-batch of a model in a loop."""
    traits = loop.traits
    if not trains_layers(shape, loop):
        return MicroBatch(_untouched(shape, traits), head_marks(shape, traits, loop.loss, False))
    layers = layer_marks(shape, traits, loop.kind.recomputed_of(shape.layers), loop.input_wants_gradient)
    return MicroBatch(layers, head_marks(shape, traits, loop.loss))


class Activations(NamedTuple):
    """Bytes beside weights and states.

    Attributes:
        kept: From the forward until the loss, logits left out.
        kept_backward: The same while the backward runs; more where the next checkpoint comes back from the host early.
        whole: What of it layers keep that are not computed again, while others are; 0 where none is.
        host: What waits in host memory meanwhile.
        layer_forward: What one layer's forward needs beside that.
        layer_blocks: What of it is allocated and freed again.
        layer_backward: The same for its backward, recomputation included.
        first_layer_backward: The same for the layer that goes backward last.
        evaluation: What the layers of a held-out batch need at their highest.
        head_evaluation: The same for its head and loss.
        loss: What head and loss need at their highest.
        copies: 16-bit adapter copies that autocast caches.
        held: Logits that the loop itself holds.
    """

    kept: float
    kept_backward: float
    whole: float
    host: int
    layer_forward: float
    layer_blocks: float
    layer_backward: float
    first_layer_backward: float
    evaluation: float
    head_evaluation: float
    loss: float
    copies: int
    held: int


def activations_of(shape: ModelShape, setup: Setup, loop: Loop, copies: int) -> Activations:
    """Return what a micro-batch holds beside weights and states.

    Args:
        shape: The model.
        setup: How it is trained.
        loop: How the loop computes it.
        copies: Bytes of the adapter copies that autocast caches.
    """
    # With a rank pattern every linear map counts with the largest rank: activations grow little with the rank.
    rank = max(setup.rank, *(rank for _, rank in setup.rank_pattern)) if setup.rank_pattern else setup.rank
    kind, tokens, squares = loop.kind, setup.tokens, setup.squares
    batch = micro_batch(shape, at_size(loop, shape, setup))
    found = batch.of_rank(rank).at(tokens, squares)
    kept, whole, checkpoint, forward, blocks, backward, first_backward, evaluation = found[:8]
    loss, loss_backward, head_evaluation = found[8:]
    ahead, back = _chunk(shape, loop, batch.head, (tokens, squares, rank))
    shared = loop.shared_per_token * tokens + 2 * shape.head_dim * kind.residual_itemsize * setup.seq_len  # cos and sin
    shared += mask_count(shape, setup, loop.traits.kernel) * loop.mask_itemsize * squares
    waits = kind.offload_checkpoints and kind.recomputes and kind.device == "cuda"
    return Activations(
        kept=shared + loop.cache_per_token * tokens + (whole + checkpoint if waits else kept),
        kept_backward=shared + (whole + min(kept - whole, 2 * checkpoint) if waits else kept),
        whole=whole,
        host=int(max(0.0, kept - whole - checkpoint)) if waits else 0,
        layer_forward=forward,
        layer_blocks=blocks,
        layer_backward=backward,
        first_layer_backward=shared + first_backward,
        evaluation=shared + copies + evaluation,
        head_evaluation=shared + copies + max(head_evaluation, ahead),
        loss=max(copies + max(loss, ahead), loss_backward, back),
        copies=copies,
        held=loop.held_per_token * tokens,
    )


def _chunk(shape: ModelShape, loop: Loop, head: HeadMarks, numbers: tuple[int, int, int]) -> tuple[float, float]:
    """Return what a chunk of the head holds with all that stands around it, forward and backward; 0 for whole logits.

    The gradient of a frozen head's chunk is made on the way forward; a trained head's chunk is computed again.
    """
    if head.chunk:
        of_chunk = (loss_chunk_tokens(shape.vocabulary, numbers[0]), 0, numbers[2])
        ahead = head.chunk.forward_beside.at(*numbers) + largest(head.chunk.forward, *of_chunk)
        return ahead, head.chunk.backward_beside.at(*numbers) + largest(head.chunk.backward, *of_chunk)
    chunk = loop.loss.chunk_bytes(shape, loop.traits, numbers[0])
    return head.around_chunk.at(*numbers) + chunk if chunk else 0, 0
