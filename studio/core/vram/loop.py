"""How our training loop computes a model: everything that decides the bytes of a step except rank, batch and length."""

from dataclasses import dataclass, replace
from functools import lru_cache

from studio.core.families import OWN_NORM, OWN_ROTARY
from studio.core.gpu_catalogue import Gpu
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, ModelShape
from studio.core.tiles import groups_heads, tile_tokens
from studio.core.trainable import AS_PEFT, HEAD, target_names
from studio.core.vram.frozen import BLOCK, FrozenForm, everywhere_plain, frozen_form, packs_stacks
from studio.core.vram.gemma import around_streams
from studio.core.vram.head import ChunkedLoss, LigerLoss, Loss, WholeLoss
from studio.core.vram.modules import AdapterTraits, Kernel, LayerTraits
from studio.core.vram.operators import Arithmetic
from studio.core.vram.setup import Setup

IDS_LABELS_MASK_BYTES = 3 * 8
"""Bytes per token of ids, labels and mask: all int64."""


@dataclass(frozen=True, eq=False, slots=True)
class Loop:
    """How a kind of loop computes a model. Ours leaves the last three as they are.

    Attributes:
        kind: The choices that it follows.
        traits: How a layer is computed.
        loss: How head and loss are made.
        frozen: How frozen weights are held.
        input_wants_gradient: Whether the embeddings' output asks for a gradient, so that the first layer goes backward
            like the others.
        whole_itemsize: Bytes per weight of a module trained whole.
        load_extra: What loading needs beside the weights, in bytes.
        copies_whole: Whether a module trained whole is copied in 16 bit before it is held in fp32.
        caches_copies: Whether autocast caches 16-bit adapter copies until the forward ends; a kept graph holds them
            anyway.
        shared_per_token: What all layers share for every token, in bytes.
        cache_per_token: What is kept until the loss though nobody reads it, in bytes per token.
        held_per_token: Logits that the loop itself holds through the backward, in bytes per token.
        optimizer_copies: Whether the optimizer's step makes temporaries of the gradients' size.
    """

    kind: Setup
    traits: LayerTraits
    loss: Loss
    frozen: FrozenForm
    input_wants_gradient: bool
    whole_itemsize: int
    load_extra: int
    copies_whole: bool
    caches_copies: bool
    shared_per_token: int
    cache_per_token: int = 0
    held_per_token: int = 0
    optimizer_copies: bool = False

    @property
    def mask_itemsize(self) -> int:
        """Bytes per entry of an S x S mask; one where it is boolean, as each layer then makes its own numbers of it."""
        if self.traits.sinks:
            return self.kind.compute_itemsize
        return 1 if self.traits.kernel == "efficient_masked" else self.kind.residual_itemsize


@lru_cache(maxsize=256)
def own_loop(shape: ModelShape, kind: Setup, kernel: Kernel) -> Loop:
    """Return how our loop computes a model.

    Args:
        shape: The model.
        kind: What kind of set-up (`Setup.kind`).
        kernel: Which attention runs.

    Raises:
        ValueError: It is a set-up of another loop, which this would price as ours.
    """
    if kind.engine != "studio":
        raise ValueError(f"this is the loop of the engine studio, not of {kind.engine}")
    traits = layer_traits(shape, kind, kernel)
    head_trained = kind.adapted.trains_head or HEAD in traits.adapter.targets
    loss: Loss = WholeLoss()
    if kind.loss != "full":
        loss = LigerLoss() if kind.loss == "liger" and not head_trained else ChunkedLoss(recomputed=head_trained)
    # Where the residual stream widens in the layers, the first layer's input is narrower than all others; a norm of the
    # embedding would have widened it before.
    widens = kind.recomputes * (traits.arithmetic.residual - kind.residual_itemsize)
    around = around_streams(shape, traits.adapter.targets, kind.residual_itemsize, traits.arithmetic.residual)
    return Loop(
        kind=kind,
        traits=traits,
        loss=loss,
        frozen=frozen_form(kind),
        input_wants_gradient=kind.adapted.trains_embedding,
        whole_itemsize=4,
        # Our loop needs a transformers that quantises one weight after another (core_model_loading.py, 5.5 and later).
        load_extra=_load_extra(shape, kind),
        copies_whole=kind.compute_itemsize != 4,
        caches_copies=kind.autocast and kind.recomputes,
        shared_per_token=IDS_LABELS_MASK_BYTES
        - (0 if shape.embedding_norm else widens) * shape.hidden
        + (shape.per_layer_width + shape.stored_heads_width) * kind.residual_itemsize
        + around.before,
        cache_per_token=around.behind,
    )


def at_size(loop: Loop, shape: ModelShape, setup: Setup) -> Loop:
    """Return the loop for a micro-batch; the same loop where layers do not depend on its size."""
    tiled = setup.engine == "studio" and not setup.compile
    of_length = shape.mixes_by_state * setup.seq_len
    plain = tiled and setup.attention == "sdpa" and not (shape.own_attention or shape.sinks)
    groups = plain and groups_heads(setup.seq_len)
    return _at_size(loop, of_length, tiled * tile_tokens(setup.tokens), groups, setup.keeps_dequantised)


@lru_cache(maxsize=256)
def _at_size(loop: Loop, length: int, tile: int, groups: bool, keeps: bool) -> Loop:
    if not (length or tile or groups or keeps):
        return loop
    sized = replace(loop.traits, length=length, tile=tile, groups_heads=groups, keeps_dequantised=keeps)
    return replace(loop, traits=sized)


@lru_cache(maxsize=256)
def with_mixer_kernels(loop: Loop) -> Loop:
    """Return the loop with kernels that mix tokens by state: the least that any of them can hold."""
    return replace(loop, traits=replace(loop.traits, fused_mixers=True))


def _load_extra(shape: ModelShape, kind: Setup) -> int:
    """Return what loading needs beside the finished weights: the widest weight in 16 bit, or an expert three times.

    An expert's matrices are read, joined and quantised one expert after another (studio/jobs/base/experts/loading.py),
    beside the scales of its whole stack in fp32, which are made twice.
    """
    if not kind.quantised:
        return 0
    of_experts = [0]
    for group in shape.groups:
        if group.layer.experts:
            up, down = group.layer.experts.stacks(shape.hidden)
            extra = [3 * s.inputs * s.outputs * kind.compute_itemsize + 8 * s.weights // BLOCK for s in (up, down)]
            # The stack that narrows is read last, when the other one is there.
            of_experts += [extra[0] - down.weights // 2, extra[1]]
    return max(widest_linear(shape) * kind.compute_itemsize, *of_experts)


def layer_traits(shape: ModelShape, kind: Setup, kernel: Kernel) -> LayerTraits:
    """Return how our loop computes a layer."""
    adapter = AdapterTraits(
        targets=target_names(shape, kind.targets, as_peft=kind.adapted.as_peft),
        dropout=kind.dropout > 0,
        dora=kind.dora,
        casts_inputs=not kind.autocast,
        whole=kind.adapted.whole_names,
        whole_itemsize=4,
    )
    residual = residual_itemsize(shape, kind)
    return LayerTraits(
        Arithmetic(kind.compute_itemsize, residual, kind.autocast, kind.embedding_itemsize),
        adapter,
        kind.quant_type if kind.quantised else "",
        kernel,
        kind.sequences > 1,
        half=kind.dtype == "fp16",
        cpu=kind.device == "cpu",
        repeats_heads=shape.repeats_heads,
        plain_attention=runs_plain(shape, kind, kernel),
        sinks=shape.sinks,
        packed_experts=kind.packs_experts and packs_stacks(shape, frozen_form(kind)),
        joins_products=True,
        fused_norms=shape.family not in OWN_NORM,
        fused_rotary=shape.family not in OWN_ROTARY,
        plain=everywhere_plain(shape, frozen_form(kind)),
    )


def trains_layers(shape: ModelShape, loop: Loop) -> bool:
    """Whether gradients flow through the layers. Where the head alone is trained, layers keep and make nothing."""
    trained = loop.traits.adapter.targets | loop.traits.adapter.whole
    of_experts = not trained.isdisjoint((AS_PEFT, EXPERTS_UP, EXPERTS_DOWN))
    inside = of_experts or any(linear.name in trained for _, linear in shape.all_linears())
    return inside or loop.input_wants_gradient


def residual_itemsize(shape: ModelShape, kind: Setup) -> int:
    """Return the bytes per element of the residual stream.

    CUDA's autocast gives layer norms and xIELU back in fp32, and quantised layers give back what they are given. Mamba
    widens the stream itself.
    """
    layer = shape.groups[0].layer
    wide = layer.norm == "layer" or layer.activation == "xielu"
    # AltUp scales its streams by their magnitudes, whose powers CUDA's autocast takes in fp32.
    widened = ((wide and kind.quantised) or layer.streams > 1) and kind.autocast and kind.device == "cuda"
    return 4 if widened or layer.wide_residual else kind.residual_itemsize


@lru_cache(maxsize=256)
def widest_linear(shape: ModelShape) -> int:
    """Return the weights of the widest linear map inside the layers."""
    return max((linear.inputs * linear.outputs for _, linear in shape.all_linears()), default=0)


def attention_kernel(shape: ModelShape, setup: Setup, gpu: Gpu | None, *, seq_len: int = 0) -> Kernel:
    """Return which attention runs.

    Flash needs 16-bit inputs, no mask, heads of at most 256, values as wide as keys, and compute capability 8.0
    (check_head_dim_size_flash and
    check_flash_attention_hardware_support in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). Without it the
    memory-efficient kernel runs on keys and values repeated for every query head. Models with capped scores or ALiBi
    run eagerly whatever is asked for: transformers refuses sdpa for them. The flash-attn package knows windows and
    capped scores. Sinks are our loop's own (studio/jobs/base/sinks.py), which tells the flash kernel of windows.

    Args:
        shape: The model.
        setup: How it is trained, or what kind of set-up.
        gpu: The card, where known.
        seq_len: Tokens per row, where they are not the set-up's.
    """
    if runs_eager(shape, setup):
        return "eager"
    if setup.device == "cpu":
        return "cpu"
    half = setup.compute_itemsize == 2 and (setup.autocast or setup.residual_itemsize == 2)
    able = gpu is None or gpu.compute_capability >= (8, 0)
    own_windows = setup.attention == "flash_attention_2" or shape.sinks
    if is_windowed(shape, seq_len or setup.seq_len) and not own_windows:
        return "efficient_masked"
    fits = shape.head_dim <= 256 and all(heads.width == heads.value_width for heads in shape.each_heads)
    return "flash" if half and able and fits else "efficient"


def runs_eager(shape: ModelShape, setup: Setup) -> bool:
    """Whether attention makes S x S matrices: because that is asked for, or because nothing else computes it."""
    return setup.attention == "eager" or not shape.fused_attention or (shape.sinks and setup.engine != "studio")


def is_windowed(shape: ModelShape, seq_len: int) -> bool:
    """Whether a window shorter than the rows makes transformers build a mask (_ignore_causal_mask_sdpa)."""
    return 0 < shape.shortest_window <= seq_len


def mask_count(shape: ModelShape, setup: Setup, kernel: Kernel) -> int:
    """Return how many S x S masks are made before the first layer and shared by all."""
    if (shape.attention_softcap or (shape.sinks and kernel == "eager")) and shape.shortest_window:
        return 2  # one for layers that see all, one for those with a window
    if shape.sinks and kernel == "flash":
        return 0
    return int(kernel == "eager" or (is_windowed(shape, setup.seq_len) and setup.attention != "flash_attention_2"))


def runs_plain(shape: ModelShape, setup: Setup, kernel: Kernel) -> bool:
    """Whether torch takes its plain attention, as no fused kernel fits.

    Fused kernels serve fewer key heads than query heads only where the caller says so (`enable_gqa`), and Falcon's own
    attention does not (modeling_falcon.py, ATen/native/transformers/sdp_utils_cpp.h
    check_batch_size_and_num_heads_dense).
    """
    shares = shape.own_attention and shape.kv_heads == 1 < shape.heads
    return shares and kernel != "eager" and setup.attention != "flash_attention_2"
