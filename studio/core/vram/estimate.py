"""The estimate: bytes by component and by stage, a range, and whether it fits a budget."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from studio.core.gpu_catalogue import Gpu, emulated
from studio.core.quantised_base import note_on
from studio.core.shape import ModelShape
from studio.core.trainable import EXPERTS, target_names
from studio.core.vram.micro_batch import runs_plain
from studio.core.vram.modules import Kernel
from studio.core.vram.prequantised import as_it_lies
from studio.core.vram.reserve import (
    CONTEXT_BYTES,
    MOST_CONTEXT_BYTES,
    Range,
    device_range,
    expected_reserved,
    reserved_range,
    unused_in_segments,
)
from studio.core.vram.setup import Setup
from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES, HOPPER_CUBLAS_WORKSPACE_BYTES, Stages, peaks_of, stages_of
from studio.core.vram.static import frozen_form, trained_bytes
from studio.core.vram.stock import ALWAYS_FUSED, COPIES_LOGITS, NEWEST, UPCASTS_LOGITS, built, masks_are_truths

Verdict = Literal["fits", "tight", "does not fit"]

_CERTAIN = 0.02
"""Relative doubt of allocated bytes: 25 rows of a T4 are within 1.2 %, 9 rows of an A100 within 1.7 %."""

_UNCERTAIN = 0.25
"""The same for an architecture that is only guessed from its sizes, and for the activations of mixtures of experts."""


@dataclass(frozen=True, slots=True)
class Components:
    """What the peak is made of, in bytes; all but `context` add up to the peak of live tensors."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    context: int


@dataclass(frozen=True, slots=True)
class VramEstimate:
    """What a set-up needs on one device.

    Attributes:
        stage: The stage that peaks.
        stages: Peak of live tensors in each stage, in order.
        components: What the peak is made of.
        allocated: Peak of live tensors (torch.cuda.max_memory_allocated). It may fall where a larger rank lets
            bitsandbytes page a state or keep it in 8 bits, by what that saves.
        reserved: Peak of the allocator's segments (torch.cuda.max_memory_reserved).
        device: What nvidia-smi shows for this process. On a card neither what is expected nor the high end falls when
            rank, batch, length or targets grow; at the low end all pages are on the host.
        trainable_parameters: Trained parameters.
        kernel: Which attention was assumed.
        host: Bytes of checkpoints that wait in the computer's own memory.
        notes: What makes the range wide, and what the user should know.
    """

    stage: str
    stages: tuple[tuple[str, int], ...]
    components: Components
    allocated: Range
    reserved: Range
    device: Range
    trainable_parameters: int
    kernel: Kernel
    host: int = 0
    notes: tuple[str, ...] = ()

    def verdict(self, budget_bytes: int) -> Verdict:
        """Return whether it fits a budget: `fits` holds at the high end of the range, `tight` only as expected."""
        if self.device.high <= budget_bytes:
            return "fits"
        return "tight" if self.device.expected <= budget_bytes else "does not fit"

    def headroom_bytes(self, budget_bytes: int) -> int:
        """Return what a budget leaves free as expected; negative when it is too small."""
        return budget_bytes - self.device.expected


def estimate_vram(shape: ModelShape, setup: Setup, gpu: Gpu | None = None) -> VramEstimate:
    """Return what a model and a set-up need on one GPU.

    Args:
        shape: The model.
        setup: How it is trained.
        gpu: The card, where known: it decides the attention kernel, workspaces and context.

    Raises:
        BadInput: A target does not exist in this model.
    """
    setup = as_it_lies(setup, shape.quantised) if shape.quantised else setup
    shape = built(shape, setup)
    kernel = attention_kernel(shape, setup, gpu)
    workspace = HOPPER_CUBLAS_WORKSPACE_BYTES if gpu and gpu.compute_capability == (9, 0) else CUBLAS_WORKSPACE_BYTES
    if setup.device == "cpu":
        return _on_cpu(shape, setup, kernel)
    stages = stages_of(shape, setup, kernel, workspace=workspace)
    low, high, notes = _allocated_bounds(shape, setup, gpu, stages, workspace)
    unused = unused_in_segments(shape, frozen_form(setup.kind))
    measured = gpu.context_bytes if gpu else 0
    context, most_context = (measured, 2 * measured) if measured else (CONTEXT_BYTES, MOST_CONTEXT_BYTES)
    reserved = reserved_range(stages, low, high, unused)
    # Pages are on the card while it has room for them.
    paged = stages.standing.paged
    spared = expected_reserved(stages, unused, stages.standing.spared) - reserved.expected
    states = Range(0, paged + spared, int(paged * (1 + _doubt(shape))))
    return VramEstimate(
        stage=stages.peak_stage,
        stages=tuple(stages.by_name.items()),
        components=_components(stages, context),
        allocated=Range(low, stages.peak, high),
        reserved=reserved,
        device=device_range(reserved, states, context, most_context),
        trainable_parameters=stages.standing.parameters,
        kernel=kernel,
        host=stages.work.host,
        notes=notes,
    )


def _on_cpu(shape: ModelShape, setup: Setup, kernel: Kernel) -> VramEstimate:
    """Return the bytes of tensors of a run on a CPU: it has no segments and no context, and nothing is paged."""
    # The guard of the first steps keeps a copy of what is trained (jobs/train/guards.py); for a card it is on the host.
    guard = 4 * trained_bytes(shape, setup.adapted, 4).parameters if setup.engine == "studio" else 0
    stages = stages_of(shape, setup, kernel, workspace=guard)
    low, high, notes = _allocated_bounds(shape, setup, None, stages, guard)
    bounds = Range(low, stages.peak, high)
    return VramEstimate(
        stage=stages.peak_stage,
        stages=tuple(stages.by_name.items()),
        components=_components(stages, 0),
        allocated=bounds,
        reserved=bounds,
        device=bounds,
        trainable_parameters=stages.standing.parameters,
        kernel=kernel,
        notes=(*notes, "on a CPU: bytes of tensors; Python and its libraries take 0.5 to 1 GiB beside them"),
    )


def attention_kernel(shape: ModelShape, setup: Setup, gpu: Gpu | None, kind: Setup | None = None) -> Kernel:
    """Return which attention runs in a set-up's kind of loop, or in another kind.

    Flash needs 16-bit inputs, no mask, heads of at most 256 and compute capability 8.0. Without it the memory-efficient
    kernel runs on keys and values repeated for every query head. Models with capped scores, sinks or ALiBi run eagerly
    whatever is asked for: transformers refuses sdpa for them. The flash-attn package knows windows and capped scores.
    """
    kind = kind or setup.kind
    if kind.attention == "eager" or not shape.fused_attention:
        return "eager"
    if kind.device == "cpu":
        return "cpu"
    half = kind.compute_itemsize == 2 and (kind.autocast or kind.residual_itemsize == 2)
    windowed = 0 < shape.shortest_window <= setup.seq_len
    able = gpu is None or gpu.compute_capability >= (8, 0)
    masked = windowed and kind.attention != "flash_attention_2"
    if masked and masks_are_truths(kind):
        return "efficient_masked"
    return "flash" if half and able and not masked and shape.head_dim <= 256 else "efficient"


def _allocated_bounds(
    shape: ModelShape, setup: Setup, gpu: Gpu | None, stages: Stages, workspace: int
) -> tuple[int, int, tuple[str, ...]]:
    """Return lowest and highest peak of live tensors, and why they differ; the highest counts steady peaks."""
    notes = [*filter(None, (shape.origin,)), *shape.doubts]
    if shape.quantised:
        notes.insert(0, note_on(shape.quantised, setup.method, setup.engine))
    if 0 < shape.positions < setup.seq_len:
        notes.append(
            f"{setup.seq_len} tokens per row are more than the {shape.positions} positions of the model's config"
        )
    low, high = float(stages.peak), float(stages.steady_peak)
    for kind in _variants(setup.kind):
        if kind is setup.kind:
            continue
        peak, steady = peaks_of(shape, setup, kind, attention_kernel(shape, setup, gpu, kind), workspace)
        low, high = min(low, peak), max(high, steady)
    base = stages.standing.base
    doubt = _doubt(shape)
    low, high = low * (1 - doubt), high * (1 + doubt)
    if setup.quantised and setup.engine == "studio" and shape.family == "falcon":
        notes.append("bitsandbytes converts no linear map of falcon in transformers 5: training on 4 bits refuses it")
    if shape.expert_parameters and setup.engine == "hf" and not setup.transformers and shape.family not in ALWAYS_FUSED:
        older = estimate_vram(shape, replace(setup, transformers=COPIES_LOGITS), gpu)
        low, base = min(low, older.allocated.low), older.components.base
        notes.append("before transformers 5 experts were linear layers of their own and quantised: say --transformers")
    if shape.expert_parameters:
        notes.extend(_expert_notes(shape, setup))
        low, high = low - _UNCERTAIN * stages.turnover, high + _UNCERTAIN * stages.turnover
    kernel, windowed = attention_kernel(shape, setup, gpu), 0 < shape.shortest_window <= setup.seq_len
    plain = runs_plain(shape, setup.kind, kernel)
    if plain:
        notes.append(
            f"{shape.family} hands PyTorch one key for all heads, for which sdpa has no fused kernel: S x S matrices "
            "in fp32 (seen in traces, not on a card)"
        )
    grouped = shape.heads != shape.kv_heads and not (plain or shape.repeats_heads or windowed)
    if grouped and setup.engine == "hf" and kernel == "efficient":
        notes.append(
            "without flash attention PyTorch may take its plain kernel for grouped heads, with S x S matrices "
            "(transformers issue 48633): the high end counts them"
        )
        high = max(high, peaks_of(shape, setup, setup.kind, "eager", workspace)[1])
    if not shape.fused_attention and setup.attention == "sdpa":
        notes.append(
            f"{shape.family} runs eager attention in transformers, whatever is asked for: S x S matrices per head"
        )
    if gpu and (said := emulated(setup.dtype, gpu.name, gpu.compute_capability)):
        notes.append(said)
    return int(max(low, base)), int(high), tuple(notes)


@lru_cache(maxsize=256)
def _variants(setup: Setup) -> tuple[Setup, ...]:
    """Return the kinds of loop that a set-up may mean.

    Stock loops differ in version, autocast and whether they hold the outputs; ours does not differ from itself.
    """
    if setup.engine == "studio":
        return ()
    unsaid = not setup.transformers and setup.micro_batch > 1
    least = UPCASTS_LOGITS if setup.fused_kernels == "foak" else NEWEST
    # The least and the most of what is held at the loss and of peft's upcast; which of the two autocasts holds more
    # depends.
    holds = (
        ((False, least), (True, COPIES_LOGITS)) if unsaid else ((kept, setup.transformers) for kept in (False, True))
    )
    return tuple(
        replace(
            setup,
            outputs_kept=kept,
            autocast=autocast,
            transformers=version,
            head_cast_back=setup.head_cast_back or (setup.dtype == "bf16" and setup.kbit_prepare and not kept),
        ).kind
        for kept, version in holds
        for autocast in ((False, True) if setup.compute_itemsize == 2 else (setup.autocast,))
    )


def _doubt(shape: ModelShape) -> float:
    return _UNCERTAIN if shape.doubts else _CERTAIN


def _expert_notes(shape: ModelShape, setup: Setup) -> list[str]:
    notes = ["activations of mixtures of experts depend on the routing"]
    adapted_by_all = any(group.layer.experts and group.layer.experts.adapted_by_all for group in shape.groups)
    if adapted_by_all and EXPERTS in target_names(shape, setup.targets):
        notes.append("peft's all-linear adapts every expert and the router: name the attention's projections instead")
    if not setup.quantised:
        return notes
    share = shape.expert_parameters / shape.parameters
    held = "fp32 after peft's upcast" if setup.residual_itemsize == 4 else "16-bit"
    return [f"bitsandbytes quantises no fused expert: {share:.0%} of this model's weights stay {held}", *notes]


def _components(stages: Stages, context: int) -> Components:
    stand, at, peak = stages.standing, stages.peak_stage, stages.peak
    logits = int(stages.work.loss) if at == "loss" else stages.work.held
    gradients = max(stages.lasting_gradients, stand.adapter if at == "optimizer" else 0)
    return Components(
        base=stand.base,
        adapter=stand.adapter,
        gradients=gradients,
        optimizer=stand.resident,
        activations=max(0, peak - stages.fixed - gradients - logits),
        logits=logits,
        workspace=stages.workspace,
        context=context,
    )
