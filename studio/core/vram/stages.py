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
        kept: Activations kept from forward to backward.
        layer_forward: What one layer's forward needs beside the kept activations.
        layer_backward: What one layer's backward needs beside them.
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
    kept: int
    layer_forward: int
    layer_backward: int
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


def stages_of(shape: ModelShape, setup: Setup, kernel: Kernel, *, workspace: int = CUBLAS_WORKSPACE_BYTES) -> Stages:
    """Return the allocated bytes of every stage.

    Args:
        shape: The model.
        setup: How it is trained.
        kernel: Which attention runs.
        workspace: Bytes of cuBLAS workspaces, 0 on a CPU.
    """
    forms = forms_of(shape, setup, kernel)
    numbers = (setup.tokens, setup.squares, setup.rank)
    parameters = adapter_parameters(shape, setup.targets, setup.rank, setup.dora)
    base = base_bytes(shape, setup.quantised, setup.double_quant, setup.residual_itemsize, setup.compute_itemsize)
    state = optimizer_bytes(shape, setup.targets, setup.rank, setup.dora, setup.optimizer)
    adapter = gradients = 4 * parameters
    # Gradients stay while micro-batches add to them; several GPUs keep them a second time in communication buckets.
    lasting = gradients * ((setup.accumulation > 1) + (setup.gpus > 1))
    standing = base + adapter + state.resident + workspace + lasting

    kept = sum(group.count * group.kept.at(*numbers) for group in forms.groups) - forms.spared.at(*numbers)
    kept += _shared(shape, setup, kernel)
    layer_forward = max(largest(g.forward, *numbers) - g.kept.at(*numbers) for g in forms.groups)
    layer_backward = max(largest(g.backward, *numbers) - g.kept.at(*numbers) for g in forms.groups)
    copies = _autocast_copies(setup, parameters)
    chunk = _chunk_bytes(shape, setup)
    loss_forward = largest(forms.loss_forward, *numbers) + chunk
    held = _held_logits(shape, setup)
    loss = max(copies + loss_forward, largest(forms.loss_backward, *numbers))
    return Stages(
        base=base,
        adapter=adapter,
        gradients=gradients,
        optimizer=state.resident,
        paged=state.paged,
        workspace=workspace,
        lasting_gradients=lasting,
        logits=int(loss),
        held=held,
        load=base + _load_extra(shape, setup),
        forward=int(standing + kept + copies + layer_forward),
        loss=int(standing + kept + loss),
        backward=int(standing + held + _backward(forms, setup, kept, gradients, numbers)),
        step=standing + held + (gradients if setup.accumulation == 1 else 0) + _step_temporary(setup, gradients),
        evaluation=int(standing + max(layer_forward, loss_forward) + copies),
        save=standing,
        kept=int(kept),
        layer_forward=int(layer_forward),
        layer_backward=int(layer_backward),
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


def _backward(forms: StepForms, setup: Setup, kept: float, gradients: int, numbers: tuple[int, int, int]) -> float:
    """The last layer goes first, with everything kept; the first layer goes last, beside nearly all gradients."""
    tops = [largest(group.backward, *numbers) - group.kept.at(*numbers) for group in forms.groups]
    first = kept + max(tops)
    lasting = gradients if setup.accumulation == 1 else 0
    return max(first, max(largest(group.backward, *numbers) for group in forms.groups) + lasting)


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
