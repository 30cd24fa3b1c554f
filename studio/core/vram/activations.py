"""What a micro-batch holds beside weights and states, in bytes: kept activations, a layer at work, head and loss."""

from typing import NamedTuple

from studio.core.loss_chunk import loss_chunk_tokens
from studio.core.shape import ModelShape
from studio.core.vram.head import HeadMarks
from studio.core.vram.micro_batch import micro_batch
from studio.core.vram.modules import Kernel
from studio.core.vram.polynomial import largest
from studio.core.vram.setup import Setup

_SOFTCAP_BYTES, _CHUNK_BYTES = 12, 8
"""Bytes per logit of a chunk in studio/jobs/train/head.py: fp32 logits, logsumexp's temporary, a soft cap's slope.

What a CPU takes inside logsumexp is not a tensor that anyone sees, and is not counted there.
"""


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


def activations_of(shape: ModelShape, setup: Setup, kind: Setup, kernel: Kernel, copies: int) -> Activations:
    """Return what a micro-batch holds beside weights and states.

    Args:
        shape: The model.
        setup: How it is trained.
        kind: The kind of loop: the set-up's own, or another that trains the same.
        kernel: Which attention runs.
        copies: Bytes of the adapter copies that autocast caches.
    """
    # With patterns every map is taken to have the largest rank: activations grow little with it.
    rank = max(setup.rank, *(rank for _, rank in setup.rank_pattern)) if setup.rank_pattern else setup.rank
    tokens, squares = setup.tokens, setup.squares
    batch = micro_batch(shape, kind, kernel)
    marks = batch.of_rank(rank).at(tokens, squares)
    kept, checkpoint, forward, blocks, backward, first_backward, evaluation = marks[:7]
    chunk = _chunk(shape, setup, batch.head, (tokens, squares, rank))
    head_evaluation, loss = _around_head(marks[7:10], chunk, copies)
    if batch.copying:
        # Where the version of transformers is not known: the mean of the newest and of those that copy the logits.
        other_evaluation, other_loss = _around_head(marks[10:], chunk, copies)
        head_evaluation, loss = (head_evaluation + other_evaluation) / 2, (loss + other_loss) / 2
    shared = batch.shared_per_token * tokens + batch.shared_per_position * setup.seq_len
    shared += mask_count(shape, setup, kernel) * batch.mask_itemsize * squares
    waits = batch.offloads
    return Activations(
        kept=shared + batch.cache_per_token * tokens + (checkpoint if waits else kept),
        kept_backward=shared + (min(kept, 2 * checkpoint) if waits else kept),
        host=int(max(0.0, kept - checkpoint)) if waits else 0,
        layer_forward=forward,
        layer_blocks=blocks,
        layer_backward=backward,
        first_layer_backward=shared + first_backward,
        evaluation=shared + copies + max(evaluation, head_evaluation),
        loss=loss,
        copies=copies,
        held=batch.held_per_token * tokens,
    )


def _around_head(marks: list[float], chunk: tuple[float, float], copies: int) -> tuple[float, float]:
    """Return the bytes around head and loss: in an evaluation, and at their highest in training."""
    forward, backward, evaluation = marks
    ahead, back = chunk
    return max(evaluation, ahead), max(copies + max(forward, ahead), backward, back)


def _chunk(shape: ModelShape, setup: Setup, head: HeadMarks, numbers: tuple[int, int, int]) -> tuple[float, float]:
    """Return what a chunk of the head holds with all that stands around it, forward and backward; 0 for whole logits.

    The gradient of a frozen head's chunk is made on the way forward; a trained head's chunk is computed again.
    """
    if head.chunk:
        of_chunk = (loss_chunk_tokens(shape.vocabulary, numbers[0]), 0, numbers[2])
        ahead = head.chunk.forward_beside.at(*numbers) + largest(head.chunk.forward, *of_chunk)
        return ahead, head.chunk.backward_beside.at(*numbers) + largest(head.chunk.backward, *of_chunk)
    chunk = chunk_bytes(shape, setup)
    return head.around_chunk.at(*numbers) + chunk if chunk else 0, 0


def mask_count(shape: ModelShape, setup: Setup, kernel: Kernel) -> int:
    """Return how many S x S masks are made before the first layer and shared by all."""
    if shape.attention_softcap and shape.shortest_window:
        return 2  # one for layers that see all, one for those with a window
    return int(kernel == "eager" or (_windowed(shape, setup) and setup.attention != "flash_attention_2"))


def _windowed(shape: ModelShape, setup: Setup) -> bool:
    """Whether a window shorter than the rows makes transformers build a mask (_ignore_causal_mask_sdpa)."""
    return 0 < shape.shortest_window <= setup.seq_len


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
