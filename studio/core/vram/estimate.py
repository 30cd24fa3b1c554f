"""The estimate: bytes by component and by stage, a range, and whether it fits a budget."""

from collections.abc import Sequence

from studio.core.base_form import four_bit_refusal, note_on
from studio.core.direct_weights import left_out
from studio.core.gpu_catalogue import Gpu, emulated
from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, ModelShape
from studio.core.trainable import AS_PEFT, target_names
from studio.core.value_kinds import ALL_LINEAR
from studio.core.vram.frozen import held_of
from studio.core.vram.loop import Loop, attention_kernel, own_loop, runs_plain, with_mixer_kernels
from studio.core.vram.modules import Kernel
from studio.core.vram.report import Components, Host, Range, VramEstimate
from studio.core.vram.reserve import (
    CONTEXT_BYTES,
    MOST_CONTEXT_BYTES,
    device_range,
    expected_reserved,
    reserved_range,
    unused_in_segments,
)
from studio.core.vram.setup import Setup, as_it_lies
from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES, HOPPER_CUBLAS_WORKSPACE_BYTES, Stages, stages_of
from studio.core.vram.static import trained_bytes

_CERTAIN = 0.02
"""Relative doubt about allocated bytes: 25 rows measured on a T4 are within 1.2 %, 9 rows of an A100 within 1.7 %."""

UNCERTAIN = 0.25
"""The same for an architecture that is only guessed from its sizes, and for the activations of mixtures of experts."""


_OF_PAIRS = {
    "dpo": "each pair of answers is two full sequences; what the base says of them is computed once, before the first "
    "step, with the adapter switched off: no second base, and no more memory than an evaluation",
    "orpo": "each pair of answers is two full sequences; orpo needs no reference model",
}


def estimate_vram(shape: ModelShape, setup: Setup, gpu: Gpu | None = None) -> VramEstimate:
    """Return what a model and a set-up of our loop need on one GPU.

    Args:
        shape: The model.
        setup: How it is trained.
        gpu: The card, where known: it decides the attention kernel, workspaces and context.

    Raises:
        BadInput: A target does not exist in this model.
    """
    setup = as_it_lies(setup, shape.quantised) if shape.quantised else setup
    kernel = attention_kernel(shape, setup, gpu)
    loop = own_loop(shape, setup.kind, kernel)
    workspace = 0 if setup.device == "cpu" else workspace_bytes(gpu)
    stages = stages_of(shape, setup, loop, workspace=workspace)
    low, high = widened(shape, stages.peak, stages.steady_peak)
    for reading in shape.readings:
        other = estimate_vram(reading, setup, gpu).allocated
        low, high = min(low, other.low), max(high, other.high)
    if shape.mixes_by_state:
        least = stages_of(shape, setup, with_mixer_kernels(loop), workspace=workspace)
        low = min(low, widened(shape, least.peak, least.peak)[0])
    if shape.expert_parameters:
        low, high = low - UNCERTAIN * stages.turnover, high + UNCERTAIN * stages.turnover
    of_loop = []
    if why := four_bit_refusal(shape.family, setup.method):
        of_loop.append(f"train refuses this base: it is {why}")
    if setup.targets in (ALL_LINEAR, (ALL_LINEAR,)):
        of_loop += filter(None, (left_out(shape.family, (linear.name for _, linear in shape.all_linears())),))
    if isinstance(setup.recompute, int) and setup.recompute < shape.layers:
        of_loop.append(f"{setup.recompute} of {shape.layers} layers are computed again on the way back: the first ones")
    if setup.paired:
        of_loop.append(_OF_PAIRS[setup.objective])
    notes = notes_of(shape, setup, gpu, kernel, of_loop=of_loop)
    return estimate_of(shape, stages, loop, gpu, low=max(low, stages.standing.base), high=high, notes=notes)


def workspace_bytes(gpu: Gpu | None) -> int:
    """Return the bytes of cuBLAS workspaces on a card."""
    return HOPPER_CUBLAS_WORKSPACE_BYTES if gpu and gpu.compute_capability == (9, 0) else CUBLAS_WORKSPACE_BYTES


def widened(shape: ModelShape, low: float, high: float) -> tuple[float, float]:
    """Return lowest and highest peak of live tensors with the doubt about both."""
    doubt = _doubt(shape)
    return low * (1 - doubt), high * (1 + doubt)


def estimate_of(
    shape: ModelShape,
    stages: Stages,
    loop: Loop,
    gpu: Gpu | None,
    *,
    low: float,
    high: float,
    notes: tuple[str, ...],
) -> VramEstimate:
    """Return the estimate that follows from the stages of any loop.

    Args:
        shape: The model.
        stages: Live tensors by stage.
        loop: How the loop computes the model.
        gpu: The card, where known.
        low: Lowest peak of live tensors.
        high: Highest peak of live tensors, counting steady peaks.
        notes: What makes the range wide, and what the user should know.
    """
    least, most = int(low), int(high)
    measured = gpu.context_bytes if gpu else 0
    context, most_context = (measured, 2 * measured) if measured else (CONTEXT_BYTES, MOST_CONTEXT_BYTES)
    if loop.kind.device == "cpu":
        # A CPU has no segments and no context, and nothing is paged.
        context = 0
        reserved = device = Range(least, stages.peak, most)
        notes = (*notes, "on a CPU: bytes of tensors; Python and its libraries take 0.5 to 1 GiB beside them")
    else:
        unused = unused_in_segments(shape, loop.frozen)
        reserved = reserved_range(stages, least, most, unused)
        # Pages are on the card while it has room for them.
        paged = stages.standing.paged
        spared = expected_reserved(stages, unused, stages.standing.spared) - reserved.expected
        states = Range(0, paged + spared, int(paged * (1 + _doubt(shape))))
        device = device_range(reserved, states, context, most_context)
    return VramEstimate(
        stage=stages.peak_stage,
        stages=tuple(stages.by_name.items()),
        components=_components(stages, context),
        allocated=Range(least, stages.peak, most),
        reserved=reserved,
        device=device,
        trainable_parameters=stages.standing.parameters,
        kernel=loop.traits.kernel,
        host=Host(stages.standing.waiting, stages.work.host),
        held=held_of(shape, loop.frozen),
        notes=notes,
    )


def notes_of(
    shape: ModelShape,
    setup: Setup,
    gpu: Gpu | None,
    kernel: Kernel,
    *,
    of_loop: Sequence[str] = (),
    of_kernel: Sequence[str] = (),
    unquantised: str = "",
) -> tuple[str, ...]:
    """Return what makes a range wide, and what the user should know.

    Args:
        shape: The model.
        setup: How it is trained.
        gpu: The card, where known.
        kernel: Which attention runs.
        of_loop: Notes on this loop alone.
        of_kernel: Notes on this kernel in this loop.
        unquantised: How weights that are not quantised are held.
    """
    notes = [] if shape.quantised is None else [note_on(shape.quantised, setup.method, setup.engine)]
    notes += [*filter(None, (shape.origin,)), *shape.doubts, *shape.notes]
    if 0 < shape.positions < setup.seq_len:
        notes.append(
            f"{setup.seq_len} tokens per row are more than the {shape.positions} positions of the model's config"
        )
    notes += _mixer_notes(shape)
    notes += of_loop
    if shape.expert_parameters:
        notes += _expert_notes(shape, setup, unquantised or ("fp32" if setup.dtype == "fp32" else "16-bit"))
    if runs_plain(shape, setup, kernel):
        notes.append(
            f"{shape.family} hands PyTorch one key for all heads, for which sdpa has no fused kernel: S x S matrices "
            "in fp32 (seen in traces, not on a card)"
        )
    notes += of_kernel
    if setup.attention == "sdpa" and kernel == "eager":
        notes.append(
            f"{shape.family} runs eager attention in transformers, whatever is asked for: S x S matrices per head"
        )
    if gpu and (said := emulated(setup.dtype, gpu.name, gpu.compute_capability)):
        notes.append(said)
    return tuple(notes)


_MIXERS = {
    "delta": ("Gated DeltaNet", "flash-linear-attention and causal-conv1d"),
    "mamba2": ("Mamba 2", "mamba-ssm and causal-conv1d"),
    "mamba": ("Mamba", "mamba-ssm and causal-conv1d"),
    "conv": ("the short convolutions", "causal-conv1d"),
}
"""What kinds of mixer are called, and the packages that bring kernels for them."""


def _mixer_notes(shape: ModelShape) -> list[str]:
    kinds = dict.fromkeys(group.layer.mixer.kind for group in shape.groups if group.layer.mixer)
    return [
        f"activations of {name} are those of PyTorch's own code (seen in traces, not on a card); with the kernels of "
        f"{packages} they may be as small as at the low end"
        for name, packages in (_MIXERS[kind] for kind in kinds)
    ]


def _doubt(shape: ModelShape) -> float:
    """Return the relative doubt about allocated bytes of a model; twice as much where parts of layers are guessed."""
    guessed = any(group.layer.beside for group in shape.groups)
    return UNCERTAIN * (1 + guessed) if shape.doubts else _CERTAIN


def _expert_notes(shape: ModelShape, setup: Setup, held: str) -> list[str]:
    notes = ["activations of mixtures of experts depend on the routing"]
    if setup.engine == "studio":
        return [*notes, *_adapted_notes(shape, setup)]
    adapted_by_all = any(group.layer.experts and group.layer.experts.adapted_by_all for group in shape.groups)
    if adapted_by_all and AS_PEFT in target_names(shape, setup.targets, as_peft=True):
        notes.append("peft's all-linear adapts every expert and the router: name the attention's projections instead")
    if not setup.quantised:
        return notes
    share = shape.expert_parameters / shape.parameters
    return [f"bitsandbytes quantises no fused expert: {share:.0%} of this model's weights stay {held}", *notes]


def _adapted_notes(shape: ModelShape, setup: Setup) -> list[str]:
    """Return what of a mixture's experts is adapted."""
    names = target_names(shape, setup.targets)
    if names.isdisjoint((EXPERTS_UP, EXPERTS_DOWN)):
        said = "routed experts and routers are not adapted; the target experts adapts the former"
        share = shape.expert_parameters / shape.parameters
        return [f"{said} ({share:.0%} of the weights)"]
    trained = trained_bytes(shape, setup.adapted, 4)
    return [f"every routed expert has an adapter of its own: {trained.of_experts / 1e6:,.0f} million parameters"]


def _components(stages: Stages, context: int) -> Components:
    """Return what the peak is made of; activations are what remains when all other parts are taken off."""
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
