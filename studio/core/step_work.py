"""What one micro-batch asks of a device: operations, bytes moved, kernels launched. Counted, without clock or card.

A LoRA step multiplies with the frozen weights once in the forward pass and once in the backward pass, for the gradient
of their inputs but not of the weights themselves. That makes 2 + 2 operations per weight and token, and 2 more where
the layer is computed again. Adapter weights are trained, so they take a third product.
"""

from dataclasses import dataclass
from functools import lru_cache

from studio.core.kernels import launches_of, moved_of
from studio.core.layer_precision import FOUR_BIT, INT8, SIXTEEN_BIT
from studio.core.placement.streaming import BUFFERS
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, Experts, LayerGroup, ModelShape
from studio.core.trainable import AdaptedPart, adapted, target_names, trainable_parameters, trained_tensors
from studio.core.vram.frozen import frozen_form, held_linears, held_stacks, streamed_bytes
from studio.core.vram.loop import runs_eager
from studio.core.vram.setup import Setup

_LOGIT_BYTES = {"full": 36, "chunked": 16, "liger": 8}
"""Bytes moved per logit: fp32 copy, softmax, its gradient and the copy back; a chunk stays in the cache in between."""

_SQUARE_BYTES = 10
"""Bytes moved per entry of an eager attention matrix in one pass: scale, mask, softmax in fp32, copy back."""

_DEQUANTISED_BYTES = {FOUR_BIT: 2.5, INT8: 3.0, SIXTEEN_BIT: 0.0}
"""Bytes moved per weight that is written out in 16 bit: half a byte or a whole one read, two written."""

_DORA_BYTES = 14
"""Bytes moved per weight of a DoRA layer: the norm is taken of the whole updated matrix (peft dora.py)."""

_OPTIMIZER_BYTES = 28
"""Bytes moved per trained parameter by a step of fp32 AdamW: weight, gradient and two moments read, three written."""

_EAGER_BACKWARD, _FUSED_BACKWARD = 2.0, 2.5
"""Operations of attention's backward over its forward: two products for each, and a fused kernel also computes the
scores again."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one micro-batch, forward and backward.

    Attributes:
        tokens: Tokens in it.
        half: Operations of 16-bit matrix products.
        single: Operations of fp32 matrix products.
        half_attention: Operations of attention's products in 16 bit.
        single_attention: The same in fp32.
        weight_bytes: Bytes of weights read by the matrix products, however few tokens there are.
        moved_bytes: Bytes moved between the products.
        dequantised_bytes: Bytes moved to bring quantised weights to 16 bit.
        host_bytes: Bytes of checkpoints that go to main memory and back.
        copied_bytes: Bytes of streamed weights that come to the card in the forward pass, and again in the backward.
        forward_share: Share of the computation that is the forward pass.
        launches: Kernels of all layers, each of which the host must launch, however few the tokens.
    """

    tokens: int
    half: float
    single: float
    half_attention: float
    single_attention: float
    weight_bytes: float
    moved_bytes: float
    dequantised_bytes: float
    host_bytes: float
    copied_bytes: float
    forward_share: float
    launches: float

    @property
    def operations_per_token(self) -> float:
        """All floating-point operations of a token."""
        return (self.half + self.single + self.half_attention + self.single_attention) / self.tokens


def step_work(shape: ModelShape, setup: Setup) -> StepWork:
    """Return what one micro-batch of full rows costs.

    Args:
        shape: The model.
        setup: How it is trained; every one of its rows has `seq_len` tokens.

    Raises:
        BadInput: A target does not exist in this model.
    """
    # A layer that is computed again goes through its frozen weights three times, else twice.
    tokens, again = setup.tokens, setup.recomputed_of(shape.layers) / shape.layers
    passes = 2 + again
    names = target_names(shape, setup.targets, as_peft=setup.adapted.as_peft)
    weights = sum(group.count * _active(group, shape.hidden, setup) for group in shape.groups)
    head = 4.0 * tokens * shape.embedding_parameters
    frozen = 2.0 * tokens * weights * passes
    pairs = _pairs_of_a_token(shape, setup.adapted, names)
    trained = 2.0 * tokens * pairs * (3 + again)
    if setup.adapted.trains_head:
        head *= 2  # its own gradient, and its chunks once more
    scores = _attention(shape, setup, again)
    half, single, half_scores, single_scores = frozen + head + trained, 0.0, scores, 0.0
    if setup.dtype == "fp32":
        half, single, half_scores, single_scores = 0.0, half, 0.0, scores
    elif not setup.autocast:
        # Without autocast fp32 adapters compute in fp32, and what peft's upcast left in fp32 does so too.
        half, single = frozen + head, trained
        if setup.residual_itemsize == 4:
            half, single, half_scores, single_scores = frozen, trained + head, 0.0, scores
    stored = sum(group.count * _stored(group, shape.hidden) for group in shape.groups)
    moved = tokens * (passes + 1) * _moved_per_token(shape, setup, names)
    moved += tokens * shape.vocabulary * _LOGIT_BYTES[setup.loss]
    if setup.dora:
        adapted_weights = sum(count * linear.weights for count, linear in adapted(shape, names))
        moved += _DORA_BYTES * adapted_weights * (1 + again)
    moved += _OPTIMIZER_BYTES * trainable_parameters(shape, setup.adapted) / setup.accumulation
    if setup.attention == "eager":
        moved += _SQUARE_BYTES * setup.squares * shape.heads * shape.layers * (passes + 1)
    offloaded = again * shape.layers if setup.offload_checkpoints else 0
    return StepWork(
        tokens=tokens,
        half=half,
        single=single,
        half_attention=half_scores,
        single_attention=single_scores,
        weight_bytes=float(setup.compute_itemsize) * (stored * passes + 2 * shape.embedding_parameters),
        moved_bytes=moved,
        dequantised_bytes=_dequantised(shape, setup, names, stored, again),
        host_bytes=2.0 * offloaded * tokens * shape.hidden * setup.residual_itemsize,
        copied_bytes=_copied(shape, setup),
        forward_share=1 / passes,
        launches=launches_of(shape, setup, names),
    )


def _dequantised(shape: ModelShape, setup: Setup, names: frozenset[str], stored: float, again: float) -> float:
    """Return the bytes moved to bring quantised weights to 16 bit, in all passes.

    Args:
        shape: The model.
        setup: How it is trained.
        names: Its targets, whose weights may be kept from their second forward pass until their backward.
        stored: The weights of all its layers.
        again: Share of the layers that are computed again.
    """
    if not setup.quantised:
        return 0.0
    four = _DEQUANTISED_BYTES[FOUR_BIT]
    if setup.precision:
        form = frozen_form(setup.kind)
        held = [
            (one, one.layers * one.linear.weights * _DEQUANTISED_BYTES[one.precision])
            for one in (*held_linears(shape, form), *held_stacks(shape, form))
        ]
        every, kept = sum(size for _, size in held), sum(size for one, size in held if one.linear.name in names)
    else:
        plain = sum(count * linear.weights for count, linear in shape.all_linears())
        every = four * (stored if setup.separate_experts or setup.packs_experts else plain)
        kept = four * sum(count * linear.weights for count, linear in adapted(shape, names))
    return every * (2 + again) - setup.keeps_dequantised * kept * again


def _copied(shape: ModelShape, setup: Setup) -> float:
    """Return the bytes of the streamed layers but for those that a pass finds in the buffers, where the last one ended.

    A pass goes through the layers in the other order than the one before it.
    """
    count = min(setup.streamed, shape.layers)
    if count <= BUFFERS:
        return 0.0
    waiting = streamed_bytes(shape, frozen_form(setup.kind), looked_up=False).host
    return waiting * (count - BUFFERS) / count


@lru_cache(maxsize=64)
def _pairs_of_a_token(shape: ModelShape, part: AdaptedPart, names: frozenset[str]) -> float:
    """Return the adapter weights that a token goes through: of those beside routed experts only what it visits."""
    stacks = names & {EXPERTS_UP, EXPERTS_DOWN}
    every = sum(count * elements for count, elements in trained_tensors(shape, part))
    if not stacks:
        return every
    plain = sum(count * elements for count, elements in trained_tensors(shape, part, without=stacks))
    experts = next(group.layer.experts for group in shape.groups if group.layer.experts)
    return plain + (every - plain) * experts.per_token / experts.count


def _active(group: LayerGroup, hidden: int, setup: Setup) -> float:
    """Return the weights of a layer that one token goes through."""
    plain = sum(linear.weights for linear in group.layer.linears)
    experts = group.layer.experts
    return plain + (experts.weights(hidden) // experts.count * _visited(experts, setup) if experts else 0)


def _visited(experts: Experts, setup: Setup) -> int:
    """Return the experts that a token is multiplied by: our groups leave out those that it did not choose."""
    return experts.per_token if setup.packs_experts else experts.products


def _stored(group: LayerGroup, hidden: int) -> float:
    """Return the weights of a layer that a batch of many tokens goes through: every expert."""
    experts = group.layer.experts
    return sum(linear.weights for linear in group.layer.linears) + (experts.weights(hidden) if experts else 0)


def _attention(shape: ModelShape, setup: Setup, again: float) -> float:
    """Return the operations of attention's two products; fused kernels skip what lies above the diagonal."""
    eager = runs_eager(shape, setup)
    forward = 4.0 * setup.squares * shape.heads * shape.head_dim
    if not eager:
        forward /= 2
    windows = sum(
        group.count * (min(1.0, 2 * group.layer.window / setup.seq_len) if group.layer.window and not eager else 1.0)
        for group in shape.groups
        if group.layer.attention
    )
    return forward * windows * (1 + again + (_EAGER_BACKWARD if eager else _FUSED_BACKWARD))


def _moved_per_token(shape: ModelShape, setup: Setup, names: frozenset[str]) -> float:
    """Return the bytes that one pass through all layers moves per token between matrix products."""
    heads, moved = (shape.heads + shape.kv_heads) * shape.head_dim, moved_of(shape, setup)
    inner = sum(group.count * _inner(group, setup) for group in shape.groups)
    elements = shape.layers * (2 * (moved.norm + moved.residual) * shape.hidden + moved.rotary * heads)
    inputs, outputs = _adapted_widths(shape, names)
    adapters = moved.adapter_in * inputs + moved.adapter_out * outputs
    return setup.residual_itemsize * (elements + moved.activation * inner) + setup.compute_itemsize * adapters


@lru_cache(maxsize=64)
def _adapted_widths(shape: ModelShape, names: frozenset[str]) -> tuple[int, int]:
    """Return the inputs and the outputs of all adapted linear maps, routed experts left out."""
    found = [(count, linear) for count, linear in adapted(shape, names) if linear.copies == 1]
    return sum(count * one.inputs for count, one in found), sum(count * one.outputs for count, one in found)


def _inner(group: LayerGroup, setup: Setup) -> float:
    """Return the width of the block between its two products, of all experts that a token goes through."""
    experts = group.layer.experts
    if experts:
        return experts.inner * _visited(experts, setup) + experts.shared_inner
    return group.layer.mlp[-1].inputs if group.layer.mlp else 0
