"""Bytes that live tensors hold in each stage of training, from load to save: torch's "allocated"."""

from functools import lru_cache
from typing import NamedTuple

from studio.core.shape import ModelShape
from studio.core.trainable import whole_tensors
from studio.core.vram.activations import activations_of
from studio.core.vram.modules import Kernel
from studio.core.vram.setup import Setup
from studio.core.vram.static import base_bytes, frozen_form, optimizer_bytes, trained_bytes

MIB = 2**20

CUBLAS_WORKSPACE_BYTES = 2 * (8 * MIB + 128 * 1024)
"""Two cuBLAS workspaces of `:4096:2:16:8` KiB, for the forward's thread and the backward's (torch CUDABlas.cpp)."""

HOPPER_CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB
"""The same on compute capability 9.0 (torch CUDABlas.cpp)."""


class Stages(NamedTuple):
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
        layer_blocks: What one layer's forward allocates and frees again.
        turnover: What is allocated and freed again within a step, at its highest: all that is not fixed, but for
            activations kept whole without checkpointing, which are allocated once and fragment nothing.
        host: Bytes of checkpoints that wait in host memory.
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
    layer_blocks: int
    turnover: int
    host: int
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
        return max(self.load, self.forward, self.loss, self.backward, self.step, self.evaluation, self.save)

    @property
    def peak_stage(self) -> str:
        """The stage that peaks."""
        stages = self.by_name
        return max(stages, key=stages.__getitem__)


def stages_of(shape: ModelShape, setup: Setup, kernel: Kernel, *, workspace: int = CUBLAS_WORKSPACE_BYTES) -> Stages:
    """Return the allocated bytes of every stage.

    Args:
        shape: The model.
        setup: How it is trained.
        kernel: Which attention runs.
        workspace: Bytes of cuBLAS workspaces, 0 on a CPU.
    """
    # Our loop trains whole modules in fp32; stock peft leaves them in the base's format.
    whole_itemsize = 4 if setup.engine == "studio" else setup.residual_itemsize
    trained = trained_bytes(shape, setup.adapted, whole_itemsize)
    base = base_bytes(shape, frozen_form(setup.kind))
    state = optimizer_bytes(shape, setup.adapted, setup.optimizer, whole_itemsize)
    adapter = gradients = trained.weights
    # Gradients stay while micro-batches add to them; several GPUs keep them a second time in communication buckets.
    lasting = gradients * ((setup.accumulation > 1) + (setup.gpus > 1))
    fresh = gradients if setup.accumulation == 1 else 0
    standing = base + adapter + state.resident + workspace + lasting
    work = activations_of(shape, setup, kernel, trained)
    # The last layer goes backward first, with everything kept; the first goes last, beside nearly all gradients.
    head = min(fresh, trained.head)
    # A layer's own gradients are in its marks already.
    embedding = min(fresh, trained.embedding)
    before = (fresh - embedding) * (shape.layers - 1) // shape.layers
    # An embedding's gradient is made last, beside its output's gradient in its own format.
    last = fresh + whole_itemsize * setup.tokens * shape.hidden if embedding else 0
    layers = max(work.kept_backward + work.layer_backward + head, work.first_layer_backward + before)
    backward = work.held + max(layers, last)
    step = work.held + fresh + _step_temporary(setup, gradients)
    within = max(work.copies + work.layer_forward, work.loss, work.held + work.layer_backward)
    turnover = max(within + (work.kept_backward if setup.grad_checkpointing else 0), fresh, step)
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
        load=base + max(_load_extra(shape, setup.kind), adapter + _whole_copy(shape, setup)),
        forward=int(standing + work.kept + work.copies + work.layer_forward),
        loss=int(standing + work.kept + work.loss),
        backward=int(standing + backward),
        step=standing + step,
        # Evaluations are between steps, when no gradient is there.
        evaluation=int(standing - gradients * (setup.accumulation > 1) + work.evaluation),
        save=standing,
        layer_blocks=int(work.layer_blocks),
        turnover=int(turnover + lasting),
        host=work.host,
        parameters=trained.parameters,
    )


def _step_temporary(setup: Setup, gradients: int) -> int:
    """Torch's foreach AdamW makes one temporary of the gradients' size (square roots); fused and 8-bit make none."""
    return gradients if setup.engine == "hf" and setup.optimizer == "adamw_torch" else 0


def _whole_copy(shape: ModelShape, setup: Setup) -> int:
    """Return the 16-bit copy that peft makes of a module before it is held in fp32 (our loop): of the largest one."""
    if not setup.modules_to_save or setup.engine == "hf" or setup.compute_itemsize == 4:
        return 0
    return setup.compute_itemsize * max(elements for _, elements in whole_tensors(shape, setup.adapted))


@lru_cache(maxsize=256)
def _load_extra(shape: ModelShape, setup: Setup) -> int:
    """Return what loading needs: one weight in 16 bits beside its packed form; for peft's upcast an embedding twice."""
    if not setup.quantised:
        return 0
    widest = max((linear.inputs * linear.outputs for _, linear in shape.all_linears()), default=0)
    upcast = shape.embedding_parameters * 2 if setup.kbit_prepare else 0
    return max(widest * 4, upcast)
