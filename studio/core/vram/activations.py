"""What a micro-batch holds beside weights and states, in bytes: kept activations, a layer at work, head and loss."""

from functools import lru_cache
from typing import NamedTuple

from studio.core.loss_chunk import loss_chunk_tokens
from studio.core.shape import ModelShape
from studio.core.trainable import HEAD, target_names
from studio.core.vram.form import largest
from studio.core.vram.fused import check_kernels
from studio.core.vram.head import ChunkMarks, HeadMarks, LossForm
from studio.core.vram.modules import AdapterForm, Kernel, LayerForm
from studio.core.vram.operators import Arithmetic
from studio.core.vram.setup import Setup
from studio.core.vram.static import TrainedBytes
from studio.core.vram.step import LayersForms, head_forms, layers_forms
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

_SOFTCAP_BYTES, _CHUNK_BYTES = 12, 8
"""Bytes per logit of a chunk in studio/jobs/train/loss.py: fp32 logits, logsumexp's temporary, a soft cap's slope.

What a CPU takes inside logsumexp is not a tensor that anyone sees, and is not counted there.
"""


@lru_cache(maxsize=256)
def forms_of(shape: ModelShape, setup: Setup, kernel: Kernel) -> tuple[LayersForms, HeadMarks]:
    """Return the forms of layers and head for a model, a kind of set-up and an attention kernel."""
    form = layer_form(shape, setup, kernel)
    layers = layers_forms(shape, form, setup.grad_checkpointing, input_wants_gradient(setup))
    return layers, head_forms(shape, form, loss_form(setup))


def input_wants_gradient(setup: Setup) -> bool:
    """Whether the embeddings' output asks for a gradient: stock peft makes it, under checkpointing."""
    return (setup.engine == "hf" and setup.grad_checkpointing) or setup.adapted.trains_embedding


def layer_form(shape: ModelShape, setup: Setup, kernel: Kernel) -> LayerForm:
    """Return how a kind of set-up computes the layers of a model."""
    ours = setup.engine == "studio"
    residual = setup.residual_itemsize
    if setup.quantised and setup.autocast and setup.device == "cuda" and shape.groups[0].layer.norm == "layer":
        # CUDA's autocast gives layer norms back in fp32, and quantised layers give back what they are given.
        residual = 4
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
        fused_upcast=setup.dtype == "fp16",
        cpu=setup.device == "cpu",
        fused_kernels=setup.fused_kernels,
        reentrant=not ours and version_of(setup.transformers or NEWEST) < REENTRANT_BELOW,
        repeats_heads=not ours and repeats_heads(shape, setup),
    )


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


class Activations(NamedTuple):
    """Bytes beside weights and states.

    Attributes:
        kept: From the forward until the loss, logits left out.
        kept_backward: The same while the backward runs; more where the next checkpoint comes back from the host early.
        host: What waits in host memory meanwhile.
        layer_forward: What one layer's forward needs beside that.
        layer_blocks: What of it is allocated and freed again.
        layer_backward: The same for its backward, recomputation included.
        first_layer_backward: The same for the layer that goes backward last.
        evaluation: What a held-out batch needs at its highest.
        loss: What they need at their highest.
        copies: 16-bit adapter copies that autocast caches.
        held: Logits that the loop itself holds.
    """

    kept: float
    kept_backward: float
    host: int
    layer_forward: float
    layer_blocks: float
    layer_backward: float
    first_layer_backward: float
    evaluation: float
    loss: float
    copies: int
    held: int


def activations_of(shape: ModelShape, setup: Setup, kernel: Kernel, trained: TrainedBytes) -> Activations:
    """Return what a micro-batch holds beside weights and states."""
    # With patterns every map is taken to have the largest rank: activations grow little with it.
    rank = max(setup.rank, *(rank for _, rank in setup.rank_pattern)) if setup.rank_pattern else setup.rank
    numbers = (setup.tokens, setup.squares, rank)
    layers = forms_of(shape, setup.kind, kernel)[0].at(*numbers)
    kept, checkpoint = layers.kept, layers.checkpoint
    # Autocast leaves an embedding alone, and the head's copy is made at the loss.
    whole = shape.embedding_parameters * (setup.adapted.trains_embedding + setup.adapted.trains_head)
    copies = setup.compute_itemsize * (trained.parameters - whole) * caches_copies(setup)
    evaluation, loss = _loss_bytes(shape, setup, kernel, numbers, copies)
    shared = _shared(shape, setup, kernel)
    offloads = setup.offload_checkpoints and setup.grad_checkpointing and setup.device == "cuda"
    return Activations(
        kept=shared + _cache(shape, setup) + (checkpoint if offloads else kept),
        kept_backward=shared + (min(kept, 2 * checkpoint) if offloads else kept),
        host=int(max(0.0, kept - checkpoint)) if offloads else 0,
        layer_forward=layers.forward,
        layer_blocks=layers.blocks,
        layer_backward=layers.backward,
        first_layer_backward=shared + layers.first_backward,
        evaluation=shared + copies + max(layers.evaluation, evaluation),
        loss=loss,
        copies=copies,
        held=_held_logits(shape, setup),
    )


def _loss_bytes(
    shape: ModelShape, setup: Setup, kernel: Kernel, numbers: tuple[int, int, int], copies: int
) -> tuple[float, float]:
    """Return the bytes around head and loss: in an evaluation, and at their highest in training.

    Where the version of transformers is not known: the mean of the newest and of those that copy the logits.
    """
    head = forms_of(shape, setup.kind, kernel)[1]
    if head.chunk:
        return _recomputed_loss(shape, head, head.chunk, numbers, copies)
    chunk = chunk_bytes(shape, setup)
    around = head.around_chunk.at(*numbers) + chunk if chunk else 0
    marks = head.at(*numbers)
    highest = max(copies + max(marks.forward, around), marks.backward)
    evaluation = max(marks.evaluation, around)
    if setup.engine == "studio" or setup.loss != "full" or setup.transformers or setup.micro_batch == 1:
        return evaluation, highest
    other = _loss_bytes(shape, setup.of_kind(copying_logits(setup.kind)), kernel, numbers, copies)
    return (evaluation + other[0]) / 2, (highest + other[1]) / 2


def _recomputed_loss(
    shape: ModelShape, head: HeadMarks, chunk: ChunkMarks, numbers: tuple[int, int, int], copies: int
) -> tuple[float, float]:
    """Return the same for a head that is trained and taken in chunks."""
    of_chunk = (loss_chunk_tokens(shape.vocabulary, numbers[0]), 0, numbers[2])
    ahead = chunk.forward_beside.at(*numbers) + largest(chunk.forward, *of_chunk)
    back = chunk.backward_beside.at(*numbers) + largest(chunk.backward, *of_chunk)
    marks = head.at(*numbers)
    forward = max(marks.forward, ahead)
    return forward, max(copies + forward, marks.backward, back)


def _head_trained(setup: Setup) -> bool:
    """Whether the head is adapted or trained whole."""
    names = (setup.targets,) if isinstance(setup.targets, str) else setup.targets
    return setup.adapted.trains_head or any(name.rpartition(".")[2] == HEAD for name in names)


def _shared(shape: ModelShape, setup: Setup, kernel: Kernel) -> int:
    """Return what all layers share: ids, labels and mask (int64), cos and sin, and an S x S mask where one is made."""
    inputs = 3 * 8 * setup.tokens
    rotary = 2 * setup.seq_len * shape.head_dim * setup.residual_itemsize
    masks = mask_count(shape, setup, kernel)
    # Embeddings that went back to 16 bit make the first layer's input narrower than all others.
    narrower = (setup.residual_itemsize - setup.embedding_itemsize) * setup.tokens * shape.hidden
    # An embedding's output that asks for a gradient lives until it has one; where the model alters it first, it is not
    # what the first checkpoint keeps.
    wants = setup.engine == "hf" and setup.grad_checkpointing
    leaf = setup.embedding_itemsize * setup.tokens * shape.hidden * (wants and shape.alters_embedding)
    return inputs + rotary + masks * setup.squares * setup.residual_itemsize - narrower + leaf


def mask_count(shape: ModelShape, setup: Setup, kernel: Kernel) -> int:
    """Return how many S x S masks are made before the first layer and shared by all."""
    if shape.attention_softcap and shape.shortest_window:
        return 2  # one for layers that see all, one for those with a window
    return int(kernel == "eager" or (_windowed(shape, setup) and setup.attention != "flash_attention_2"))


def _cache(shape: ModelShape, setup: Setup) -> int:
    """Return what GPTBigCode keeps for a cache that nobody reads, until its outputs go.

    Under checkpointing it alone leaves `use_cache` on, and the keys and values that it keeps are views of all that
    c_attn gave (modeling_gpt_bigcode.py of transformers 4.45.2; 5 turns it off for every model).
    """
    old = version_of(setup.transformers or COPIES_LOGITS) < REENTRANT_BELOW
    if shape.family != "gpt_bigcode" or setup.engine == "studio" or not setup.grad_checkpointing or not old:
        return 0
    wide = 4 if setup.quantised and setup.autocast else setup.residual_itemsize
    outputs = sum(group.count * linear.outputs for group in shape.groups for linear in group.layer.qkv)
    return outputs * wide * setup.tokens


def _windowed(shape: ModelShape, setup: Setup) -> bool:
    """Whether a window shorter than the rows makes transformers build a mask (_ignore_causal_mask_sdpa)."""
    return 0 < shape.shortest_window <= setup.seq_len


def caches_copies(setup: Setup) -> bool:
    """Whether autocast caches 16-bit adapter copies until the forward ends; a kept graph holds them anyway."""
    cast_within = setup.fused_kernels == "foak" and setup.quantised  # its adapters never come to autocast's cache
    return setup.autocast and setup.compute_itemsize != 4 and setup.grad_checkpointing and not cast_within


def _held_logits(shape: ModelShape, setup: Setup) -> int:
    """Logits that a loop's own `outputs` keeps alive through backward and optimizer step."""
    if not setup.outputs_kept or setup.loss != "full":
        return 0
    itemsize = setup.compute_itemsize if setup.autocast else setup.residual_itemsize
    if loss_form(setup.kind).upcast_outputs:
        itemsize = 4
    return setup.tokens * shape.vocabulary * itemsize


def chunk_bytes(shape: ModelShape, setup: Setup) -> int:
    """Return what a chunk of the head needs at once, 0 for whole logits."""
    if setup.loss == "full":
        return 0
    if setup.engine == "studio" and setup.loss == "chunked":
        chunk, compute = loss_chunk_tokens(shape.vocabulary, setup.tokens), setup.compute_itemsize
        if shape.logit_softcap:
            return chunk * shape.vocabulary * _SOFTCAP_BYTES
        # fp32 logits beside their 16-bit product, later beside 16-bit probabilities and the chunk's gradient.
        narrow = 4 + compute % 4
        inner = _CHUNK_BYTES if setup.device == "cuda" else narrow
        return chunk * max(inner * shape.vocabulary, narrow * shape.vocabulary + compute * shape.hidden)
    # liger_kernel/ops/fused_linear_cross_entropy.py: gradients overwrite the chunk's logits.
    share = -(-setup.tokens // -(-shape.vocabulary // shape.hidden))
    # foak has an early copy of it, which makes the chunk's logits fp32 first.
    per_logit = setup.compute_itemsize + (4 if setup.fused_kernels == "foak" else 0)
    return min(setup.tokens, 1 << max(0, share - 1).bit_length()) * shape.vocabulary * per_logit
