"""Bytes that live tensors hold in each stage of training, from load to save: torch's "allocated"."""

from dataclasses import dataclass

from studio.core.loss_chunk import loss_chunk_tokens
from studio.core.shape import ModelShape
from studio.core.trainable import target_names
from studio.core.vram.form import largest
from studio.core.vram.head import LossForm, LossKind
from studio.core.vram.modules import AdapterForm, Kernel, LayerForm
from studio.core.vram.operators import Arithmetic
from studio.core.vram.setup import Setup
from studio.core.vram.static import adapter_parameters, base_bytes, optimizer_bytes
from studio.core.vram.step import StepForms, step_forms

MIB = 2**20

CUBLAS_WORKSPACE_BYTES = 2 * (8 * MIB + 128 * 1024)
"""Two cuBLAS workspaces of `:4096:2:16:8` KiB, for the forward's thread and the backward's (torch CUDABlas.cpp)."""

HOPPER_CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB
"""The same on compute capability 9.0 (torch CUDABlas.cpp)."""

_SOFTCAP_BYTES, _CHUNK_BYTES = 12, 8
"""Bytes per logit of a chunk in studio/jobs/train/loss.py: fp32 logits, logsumexp's temporary, a soft cap's slope."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Allocated bytes by stage and what they are made of.

    Attributes:
        base: Frozen weights.
        adapter: Adapter weights, fp32.
        gradients: Adapter gradients, fp32.
        optimizer: Optimizer state that stays on the device.
        paged: Optimizer state in unified memory.
        workspace: cuBLAS workspaces.
        lasting_gradients: Bytes of gradients that are alive all the time (accumulation, several GPUs).
        logits: What the loss holds beside kept activations, at its highest.
        held: Logits that the loop itself holds through the backward.
        load: Peak while the model is loaded.
        forward: Peak while layers run forward.
        loss: Peak around head and loss.
        backward: Peak while layers run backward.
        step: Peak of the optimizer's step.
        evaluation: Peak of a held-out batch of the same size.
        save: While the adapter is written.
        layer_forward: What one layer's forward needs beside the activations kept from forward to backward.
        turnover: What is allocated and freed again within a step, at its highest: all that is not fixed, but for
            activations kept whole without checkpointing, which are allocated once and fragment nothing.
        parameters: Trained parameters.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    paged: int
    workspace: int
    lasting_gradients: int
    logits: int
    held: int
    load: int
    forward: int
    loss: int
    backward: int
    step: int
    evaluation: int
    save: int
    layer_forward: int
    turnover: int
    parameters: int

    @property
    def by_name(self) -> dict[str, int]:
        """Peak of live tensors per stage, in the order in which stages come."""
        return {
            "load": self.load,
            "forward": self.forward,
            "loss": self.loss,
            "backward": self.backward,
            "optimizer": self.step,
            "eval": self.evaluation,
            "save": self.save,
        }

    @property
    def fixed(self) -> int:
        """What is there from the first step to the last; gradients and activations come on top."""
        return self.base + self.adapter + self.optimizer + self.workspace

    @property
    def peak(self) -> int:
        """Peak of live tensors."""
        return max(self.by_name.values())

    @property
    def peak_stage(self) -> str:
        """The stage that peaks."""
        return max(self.by_name.items(), key=lambda item: item[1])[0]


def forms_of(shape: ModelShape, setup: Setup, kernel: Kernel) -> StepForms:
    """Return the forms of a step for a model, a set-up and an attention kernel."""
    arithmetic = Arithmetic(setup.compute_itemsize, setup.residual_itemsize, setup.autocast)
    ours = setup.engine == "studio"
    adapter = AdapterForm(
        targets=target_names(shape, setup.targets),
        dropout=setup.dropout > 0,
        dora=setup.dora,
        casts_inputs=not (ours and setup.autocast),
    )
    fused_upcast = setup.dtype == "fp16"
    form = LayerForm(arithmetic, adapter, setup.quantised, kernel, setup.micro_batch > 1, fused_upcast)
    kind: LossKind = "chunked" if setup.loss == "chunked" else "whole" if ours else "model"
    return step_forms(shape, form, LossForm(kind, setup.outputs_kept and kind == "model"), setup.grad_checkpointing)


@dataclass(frozen=True, slots=True)
class _Activations:
    """Bytes beside weights and states: kept for the backward, in a layer, at the loss, added by autocast or a loop."""

    kept: float
    layer_forward: float
    layer_backward: float
    first_layer_backward: float
    loss_forward: float
    loss: float
    copies: int
    held: int


def _activations(shape: ModelShape, setup: Setup, kernel: Kernel, parameters: int) -> _Activations:
    forms = forms_of(shape, setup, kernel)
    # With patterns every map is taken to have the largest rank: activations grow little with it.
    rank = max((setup.rank, *(rank for _, rank in setup.rank_pattern)))
    numbers = (setup.tokens, setup.squares, rank)
    kept = sum(group.count * group.kept.at(*numbers) for group in forms.groups) - forms.spared.at(*numbers)
    copies = _autocast_copies(setup, parameters)
    loss_forward = largest(forms.loss_forward, *numbers) + _chunk_bytes(shape, setup)
    return _Activations(
        kept=kept + _shared(shape, setup, kernel),
        layer_forward=max(largest(group.forward, *numbers) - group.kept.at(*numbers) for group in forms.groups),
        layer_backward=max(largest(group.backward, *numbers) - group.kept.at(*numbers) for group in forms.groups),
        first_layer_backward=max(largest(group.backward, *numbers) for group in forms.groups),
        loss_forward=loss_forward,
        loss=max(copies + loss_forward, largest(forms.loss_backward, *numbers)),
        copies=copies,
        held=_held_logits(shape, setup),
    )


def stages_of(shape: ModelShape, setup: Setup, kernel: Kernel, *, workspace: int = CUBLAS_WORKSPACE_BYTES) -> Stages:
    """Return the allocated bytes of every stage.

    Args:
        shape: The model.
        setup: How it is trained.
        kernel: Which attention runs.
        workspace: Bytes of cuBLAS workspaces, 0 on a CPU.
    """
    parameters = adapter_parameters(shape, setup.adapted)
    base = base_bytes(shape, setup.quantised, setup.double_quant, setup.residual_itemsize, setup.compute_itemsize)
    state = optimizer_bytes(shape, setup.adapted, setup.optimizer)
    adapter = gradients = 4 * parameters
    # Gradients stay while micro-batches add to them; several GPUs keep them a second time in communication buckets.
    lasting = gradients * ((setup.accumulation > 1) + (setup.gpus > 1))
    fresh = gradients if setup.accumulation == 1 else 0
    standing = base + adapter + state.resident + workspace + lasting
    work = _activations(shape, setup, kernel, parameters)
    # The last layer goes backward first, with everything kept; the first goes last, beside nearly all gradients.
    backward = work.held + max(work.kept + work.layer_backward, work.first_layer_backward + fresh)
    step = work.held + fresh + _step_temporary(setup, gradients)
    within = max(work.copies + work.layer_forward, work.loss, work.held + work.layer_backward)
    turnover = max(within + (work.kept if setup.grad_checkpointing else 0), fresh, step)
    return Stages(
        base=base,
        adapter=adapter,
        gradients=gradients,
        optimizer=state.resident,
        paged=state.paged,
        workspace=workspace,
        lasting_gradients=lasting,
        logits=int(work.loss),
        held=work.held,
        load=base + _load_extra(shape, setup),
        forward=int(standing + work.kept + work.copies + work.layer_forward),
        loss=int(standing + work.kept + work.loss),
        backward=int(standing + backward),
        step=standing + step,
        evaluation=int(standing + max(work.layer_forward, work.loss_forward) + work.copies),
        save=standing,
        layer_forward=int(work.layer_forward),
        turnover=int(turnover + lasting),
        parameters=parameters,
    )


def _shared(shape: ModelShape, setup: Setup, kernel: Kernel) -> int:
    """Return what all layers share: ids, labels and mask (int64), cos and sin, and an S x S mask where one is made."""
    inputs = 3 * 8 * setup.tokens
    rotary = 2 * setup.seq_len * shape.head_dim * setup.residual_itemsize
    masked = kernel == "eager" or _windowed(shape, setup)
    return inputs + rotary + (setup.squares * setup.residual_itemsize if masked else 0)


def _windowed(shape: ModelShape, setup: Setup) -> bool:
    """Whether a window shorter than the rows makes transformers build a mask (_ignore_causal_mask_sdpa)."""
    return any(0 < group.layer.window <= setup.seq_len for group in shape.groups)


def _autocast_copies(setup: Setup, parameters: int) -> int:
    """Return 16-bit adapter copies that autocast caches until the forward ends; a kept graph holds them anyway."""
    if not setup.autocast or setup.compute_itemsize == 4 or not setup.grad_checkpointing:
        return 0
    return setup.compute_itemsize * parameters


def _held_logits(shape: ModelShape, setup: Setup) -> int:
    """Logits that a loop's own `outputs` keeps alive through backward and optimizer step."""
    if not setup.outputs_kept or setup.loss == "chunked":
        return 0
    itemsize = setup.compute_itemsize if setup.autocast else setup.residual_itemsize
    return setup.tokens * shape.vocabulary * itemsize


def _chunk_bytes(shape: ModelShape, setup: Setup) -> int:
    if setup.loss != "chunked":
        return 0
    if setup.engine == "studio":
        per_logit = _SOFTCAP_BYTES if shape.logit_softcap else _CHUNK_BYTES
        return loss_chunk_tokens(shape.vocabulary, setup.tokens) * shape.vocabulary * per_logit
    # liger_kernel/ops/fused_linear_cross_entropy.py: gradients overwrite the chunk's logits.
    share = -(-setup.tokens // -(-shape.vocabulary // shape.hidden))
    return (1 << max(0, share - 1).bit_length()) * shape.vocabulary * setup.compute_itemsize


def _step_temporary(setup: Setup, gradients: int) -> int:
    """Torch's foreach AdamW makes one temporary of the gradients' size (square roots); fused and 8-bit make none."""
    return gradients if setup.engine == "hf" and setup.optimizer == "adamw_torch" else 0


def _load_extra(shape: ModelShape, setup: Setup) -> int:
    """Return what loading needs: one weight in 16 bits beside its packed form; for peft's upcast an embedding twice."""
    if not setup.quantised:
        return 0
    widest = max((linear.inputs * linear.outputs for _, linear in shape.all_linears()), default=0)
    upcast = shape.embedding_parameters * 2 if setup.kbit_prepare else 0
    return max(widest * 4, upcast)
