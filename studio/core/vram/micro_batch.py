"""A micro-batch before its numbers are known: which forms describe its layers, its head and what they share."""

from dataclasses import dataclass
from functools import lru_cache

from studio.core.shape import ModelShape
from studio.core.trainable import HEAD, target_names
from studio.core.vram.form import Heights, heights
from studio.core.vram.fused import check_kernels
from studio.core.vram.head import HeadMarks, LossForm
from studio.core.vram.modules import AdapterForm, Kernel, LayerForm
from studio.core.vram.operators import Arithmetic
from studio.core.vram.setup import Setup
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
