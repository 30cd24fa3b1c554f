"""How a stock loop computes a model, after its version of transformers, its upcasts and its kernels."""

from dataclasses import fields, replace
from functools import lru_cache

from studio.core.gpu_catalogue import Gpu
from studio.core.shape import ModelShape
from studio.core.stock.modules import StockTraits, TransformersLoss, check_kernels
from studio.core.stock.setup import (
    COPIES_LOGITS,
    REENTRANT_BELOW,
    SHIFT_COPIED_BELOW,
    TRUTHS_FROM,
    UPCAST_BELOW,
    StockSetup,
    repeats_heads,
    version_of,
)
from studio.core.vram.frozen import frozen_form
from studio.core.vram.head import LigerLoss, Loss
from studio.core.vram.loop import (
    IDS_LABELS_MASK_BYTES,
    Loop,
    attention_kernel,
    layer_traits,
    widest_linear,
)
from studio.core.vram.modules import Kernel, LayerTraits


def stock_kernel(shape: ModelShape, setup: StockSetup, gpu: Gpu | None, *, seq_len: int = 0) -> Kernel:
    """Return which attention runs, as `attention_kernel` does; older versions give sdpa a mask of numbers: no copy."""
    kernel = attention_kernel(shape, setup, gpu, seq_len=seq_len)
    return "efficient" if kernel == "efficient_masked" and setup.version < TRUTHS_FROM else kernel


@lru_cache(maxsize=256)
def stock_loop(shape: ModelShape, kind: StockSetup, kernel: Kernel) -> Loop:
    """Return how a stock loop computes a model, as its version of transformers builds it.

    Args:
        shape: The model.
        kind: What kind of set-up (`Setup.kind`).
        kernel: Which attention runs.

    Raises:
        BadInput: There are no such fused kernels for this model.
    """
    traits = _traits(shape, kind, kernel)
    # foak casts the adapters within its own functions, so that autocast caches no copy of them.
    cast_within = kind.fused_kernels == "foak" and kind.quantised
    wants_gradient = kind.recomputes or kind.adapted.trains_embedding
    return Loop(
        kind=kind,
        traits=traits,
        loss=_loss(kind),
        frozen=frozen_form(kind),
        input_wants_gradient=wants_gradient,
        whole_itemsize=kind.residual_itemsize,
        load_extra=_load_extra(shape, kind),
        copies_whole=False,
        caches_copies=kind.autocast and kind.compute_itemsize != 4 and kind.recomputes and not cast_within,
        shared_per_token=_shared_per_token(shape, kind, traits),
        cache_per_token=_cache_per_token(shape, kind),
        held_per_token=_held_per_token(shape, kind),
        # Torch's foreach AdamW makes one temporary of the gradients' size (square roots); fused and 8-bit make none.
        optimizer_copies=kind.optimizer == "adamw_torch",
    )


def _traits(shape: ModelShape, kind: StockSetup, kernel: Kernel) -> StockTraits:
    """Return how a layer is computed: as in our loop, except for what the version and the kernels change."""
    check_kernels(shape, kind.fused_kernels, fused_loss=kind.loss != "full")
    ours = layer_traits(shape, kind, kernel)
    adapter = replace(ours.adapter, casts_inputs=True, whole_itemsize=ours.arithmetic.residual)
    same = {field.name: getattr(ours, field.name) for field in fields(LayerTraits)}
    same |= dict.fromkeys(("joins_products", "fused_norms", "fused_rotary"), False)  # what our loop fuses
    repeats = shape.repeats_heads or repeats_heads(shape, kind)
    # Checkpoints of torch's older kind (`use_reentrant=True`) run a whole forward and backward inside the backward.
    whole = kind.version < REENTRANT_BELOW
    return StockTraits(
        **{**same, "adapter": adapter, "repeats_heads": repeats, "recomputes_whole": whole},
        fused_kernels=kind.fused_kernels,
    )


def _loss(kind: StockSetup) -> Loss:
    """Return how these kernels, or else this version of transformers, make head and loss."""
    foak = kind.fused_kernels == "foak"
    if kind.loss != "full":
        # foak has an early copy of liger's kernel, which makes the chunk's logits fp32 first.
        return LigerLoss(wider=4 if foak else 0)
    return TransformersLoss(
        kind.outputs_kept,
        upcast_outputs=kind.version < UPCAST_BELOW,
        shift_copied=(kind.version < SHIFT_COPIED_BELOW or foak) and kind.micro_batch > 1,
        overwrites=foak,
        by_model=kind.version < SHIFT_COPIED_BELOW,
    )


def _load_extra(shape: ModelShape, kind: StockSetup) -> int:
    """Return what loading needs beside the weights, in bytes.

    That is the larger of two things: the widest weight in 16 bits before it is quantised, twice, since transformers
    before 5.5 held a second one meanwhile; or a second copy of the embedding for peft's upcast.
    """
    if not kind.quantised:
        return 0
    return max(widest_linear(shape) * 4, shape.embedding_parameters * 2 if kind.kbit_prepare else 0)


def _shared_per_token(shape: ModelShape, kind: StockSetup, traits: StockTraits) -> int:
    """Return what all layers share for every token, in bytes: ids, labels, mask, embeddings that no layer keeps."""
    # Embeddings that went back to 16 bit make the first layer's input narrower than all others, and so does a stream
    # that widens on its way through the layers, where no norm of the embedding has widened it before.
    narrower = kind.residual_itemsize - kind.embedding_itemsize
    widens = kind.recomputes * (traits.arithmetic.residual - kind.residual_itemsize)
    narrower += 0 if shape.embedding_norm else widens
    # An embedding's output that asks for a gradient lives until it has one; where the model alters it first, it is not
    # what the first checkpoint keeps.
    wants = kind.recomputes
    leaf = kind.embedding_itemsize * shape.hidden * (wants and shape.alters_embedding)
    # What a dropout and a norm of it save for that gradient: a mask, and the fp32 copy that autocast makes.
    mask = (1 if kind.device == "cuda" else kind.residual_itemsize) * (wants and shape.embedding_dropout)
    copy = 4 * (wants and shape.embedding_norm and widens > 0)
    return IDS_LABELS_MASK_BYTES + leaf + (mask + copy - narrower) * shape.hidden


def _cache_per_token(shape: ModelShape, kind: StockSetup) -> int:
    """Return what GPTBigCode keeps in a cache that nobody reads, until its outputs are freed, in bytes per token.

    Under checkpointing it alone leaves `use_cache` on, and the keys and values that it keeps are views of all that
    c_attn gave (modeling_gpt_bigcode.py of transformers 4.45.2; 5 turns it off for every model).
    """
    old = version_of(kind.transformers or COPIES_LOGITS) < REENTRANT_BELOW
    if shape.family != "gpt_bigcode" or not kind.recomputes or not old:
        return 0
    wide = 4 if kind.quantised and kind.autocast else kind.residual_itemsize
    return wide * sum(group.count * linear.outputs for group in shape.groups for linear in group.layer.qkv)


def _held_per_token(shape: ModelShape, kind: StockSetup) -> int:
    """Logits that a loop's own `outputs` keeps alive through backward and optimizer step, in bytes per token."""
    if not kind.outputs_kept or kind.loss != "full":
        return 0
    if kind.version < UPCAST_BELOW:
        return 4 * shape.vocabulary
    return (kind.compute_itemsize if kind.autocast else kind.residual_itemsize) * shape.vocabulary
