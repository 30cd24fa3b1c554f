"""Bytes that live tensors hold in each stage of training, from load to save: torch's "allocated"."""

from functools import lru_cache
from typing import NamedTuple

from studio.core.shape import ModelShape
from studio.core.trainable import AdaptedPart, whole_tensors
from studio.core.vram.frozen import base_bytes, streamed_bytes
from studio.core.vram.loop import Loop
from studio.core.vram.micro_batch import Activations, activations_of
from studio.core.vram.setup import Setup
from studio.core.vram.static import optimizer_bytes, trained_bytes

MIB = 2**20

CUBLAS_WORKSPACE_BYTES = 2 * (8 * MIB + 128 * 1024)
"""Two cuBLAS workspaces of `:4096:2:16:8` KiB, for the forward's thread and the backward's (torch CUDABlas.cpp)."""

HOPPER_CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB
"""The same on compute capability 9.0 (torch CUDABlas.cpp)."""


STAGES = ("load", "forward", "loss", "backward", "optimizer", "eval", "save")
"""The stages of training, in the order in which they come."""


class Peaks(NamedTuple):
    """Peak of live tensors in each stage, in bytes.

    Attributes:
        load: While the model is loaded.
        forward: While layers run forward.
        loss: Around head and loss.
        backward: While layers run backward.
        optimizer: The optimizer's step.
        evaluation: A held-out batch of the same size.
        save: While the adapter is written.
    """

    load: int
    forward: int
    loss: int
    backward: int
    optimizer: int
    evaluation: int
    save: int


class Standing(NamedTuple):
    """What a micro-batch does not change.

    Attributes:
        base: Frozen weights.
        adapter: Adapter weights, and as many bytes of gradients.
        head: Bytes of `adapter` that belong to a head that is trained whole.
        embedding: The same for the input embedding.
        embedding_gradient: Bytes per token of the gradient of an embedding's output, where one is trained.
        resident: Optimizer state that stays on the device.
        paged: Optimizer state in unified memory.
        spared: How much more the states of smaller tensors may take (`OptimizerBytes.spared`).
        temporary: What the optimizer's step allocates and frees again.
        copies: 16-bit adapter copies that autocast caches.
        load: Peak while the model is loaded.
        parameters: Trained parameters.
        waiting: Frozen weights that wait in main memory.
    """

    base: int
    adapter: int
    head: int
    embedding: int
    embedding_gradient: int
    resident: int
    paged: int
    spared: int
    temporary: int
    copies: int
    load: int
    parameters: int
    waiting: int


class Stages(NamedTuple):
    """Allocated bytes by stage and what they are made of.

    Attributes:
        standing: What a micro-batch does not change.
        work: What a micro-batch holds beside that.
        peaks: Peak of live tensors in each stage.
        at_work: The highest of these peaks once the model is loaded.
        workspace: cuBLAS workspaces.
        lasting_gradients: Bytes of gradients that are alive all the time (accumulation, several GPUs).
        turnover: What is allocated and freed again within a step, at its highest. That is everything that is not fixed,
            except activations of layers that are not computed again: those are allocated once and fragment nothing.
    """

    standing: Standing
    work: Activations
    peaks: Peaks
    at_work: int
    workspace: int
    lasting_gradients: int
    turnover: int

    @property
    def by_name(self) -> dict[str, int]:
        """Peak of live tensors per stage, in the order in which stages come."""
        return dict(zip(STAGES, self.peaks, strict=True))

    @property
    def fixed(self) -> int:
        """What is there from the first step to the last; gradients and activations come on top."""
        stand = self.standing
        return stand.base + stand.adapter + stand.resident + self.workspace

    @property
    def peak(self) -> int:
        """Peak of live tensors."""
        return max(self.peaks.load, self.at_work)

    @property
    def steady_peak(self) -> int:
        """The peak with 8-bit states as large as a smaller tensor's: it never falls when a rank grows."""
        return max(self.peaks.load, self.at_work + self.standing.spared)

    @property
    def peak_stage(self) -> str:
        """The stage that peaks."""
        return STAGES[self.peaks.index(self.peak)]


def stages_of(shape: ModelShape, setup: Setup, loop: Loop, *, workspace: int = CUBLAS_WORKSPACE_BYTES) -> Stages:
    """Return the allocated bytes of every stage.

    Args:
        shape: The model.
        setup: How it is trained.
        loop: How the loop computes it.
        workspace: Bytes of cuBLAS workspaces, 0 on a CPU.
    """
    stand = standing(shape, loop, setup.adapted)
    return stages_with(stand, activations_of(shape, setup, loop, stand.copies), shape, setup, workspace)


def stages_with(stand: Standing, work: Activations, shape: ModelShape, setup: Setup, workspace: int) -> Stages:
    """Return the allocated bytes of every stage.

    Args:
        stand: What a micro-batch does not change.
        work: What it holds beside that.
        shape: The model.
        setup: How it is trained.
        workspace: Bytes of cuBLAS workspaces, 0 on a CPU.
    """
    fresh, lasting = _gradients(stand, setup)
    within = max(work.copies + work.layer_forward, work.loss, work.held + work.layer_backward)
    within += work.kept_backward - work.whole if setup.recomputes else 0
    turnover = max(within, fresh, work.held + fresh + stand.temporary) + lasting
    peaks = _peaks(shape, setup, stand, work, workspace)
    return Stages(stand, work, peaks, max(peaks[1:]), workspace, lasting, int(turnover))


@lru_cache(maxsize=2048)
def standing(shape: ModelShape, loop: Loop, part: AdaptedPart) -> Standing:
    """Return what a micro-batch does not change. It is cached as a whole, as sliders of batch and length need it often.

    Args:
        shape: The model.
        loop: How the loop computes it.
        part: What is trained.
    """
    kind = loop.kind
    trained = trained_bytes(shape, part, loop.whole_itemsize)
    streamed = streamed_bytes(shape, loop.frozen, looked_up=not part.trains_embedding)
    base = base_bytes(shape, loop.frozen) - streamed.left
    state = optimizer_bytes(shape, part, kind.optimizer, loop.whole_itemsize, pages=kind.device == "cuda")
    # Autocast leaves an embedding alone, as our products do with pairs on experts; the head's copy is made at the loss.
    whole = shape.embedding_parameters * (part.trains_embedding + part.trains_head)
    copied = trained.parameters - whole - trained.of_experts
    if loop.traits.joins_products and not part.dora:
        # Nor does our product with the pair leave anything to autocast.
        copied = sum(count * elements for count, elements in whole_tensors(shape, part)) - whole
    undone = trained.weights + state.resident if kind.on_oom == "shrink" and kind.device == "cpu" else 0
    copy = 0
    if part.modules_to_save and loop.copies_whole:
        copy = kind.compute_itemsize * max(elements for _, elements in whole_tensors(shape, part))
    return Standing(
        base=base + streamed.buffers,
        adapter=trained.weights,
        head=trained.head,
        embedding=trained.embedding,
        embedding_gradient=loop.whole_itemsize * shape.hidden if trained.embedding else 0,
        resident=state.resident,
        paged=state.paged,
        spared=state.spared,
        temporary=(trained.weights if loop.optimizer_copies else 0) + undone,
        # Copies that layers keep for their backward are counted there.
        copies=int(
            kind.compute_itemsize * copied * loop.caches_copies * (kind.recomputed_of(shape.layers) / shape.layers)
        ),
        load=base + max(loop.load_extra, trained.weights + copy, trained.weights + streamed.buffers),
        parameters=trained.parameters,
        waiting=streamed.host,
    )


def _gradients(stand: Standing, setup: Setup) -> tuple[int, int]:
    """Return the bytes of gradients that every backward makes, and of those that are alive all the time.

    With accumulation they stay: micro-batches add to them. Several GPUs keep them once more in communication buckets.
    """
    accumulates = setup.accumulation > 1
    return 0 if accumulates else stand.adapter, stand.adapter * (accumulates + (setup.gpus > 1))


def _peaks(shape: ModelShape, setup: Setup, stand: Standing, work: Activations, workspace: int) -> Peaks:
    """Return the peak of each stage: what is always there, and what that stage adds."""
    fresh, lasting = _gradients(stand, setup)
    always = stand.base + stand.adapter + stand.resident + workspace + lasting
    # The last layer goes backward first, while everything is kept; the first layer goes last, beside the gradients of
    # all others. A layer's own gradients are in its marks already.
    before = (fresh - min(fresh, stand.embedding)) * (shape.layers - 1) // shape.layers
    # An embedding's gradient is made last, beside the gradient of its output, which has the embedding's format.
    last = fresh + stand.embedding_gradient * setup.tokens if fresh and stand.embedding else 0
    whole = work.kept_backward + work.layer_backward + min(fresh, stand.head)
    backward = max(whole, work.first_layer_backward + before, last)
    # Evaluations are between steps, when no gradient is there.
    between = always - (stand.adapter if setup.accumulation > 1 else 0)
    return Peaks(
        load=stand.load,
        forward=int(always + work.kept + work.copies + work.layer_forward),
        loss=int(always + work.kept + work.loss),
        backward=int(always + work.held + backward),
        optimizer=always + work.held + fresh + stand.temporary,
        evaluation=int(between + max(work.evaluation, work.head_evaluation)),
        save=always,
    )
