"""The bytes of what is trained: adapters, modules trained whole, and the optimizer's state."""

from dataclasses import dataclass
from functools import lru_cache

from studio.core.shape import EXPERTS_DOWN, EXPERTS_UP, ModelShape
from studio.core.trainable import AdaptedPart, target_names, trained_tensors, whole_tensors
from studio.core.vram.frozen import aligned

_PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages a state tensor (optim/optimizer.py get_state_buffer)."""

_EIGHT_BIT_FROM = 4096
"""Elements from which bitsandbytes keeps a state in 8 bits (min_8bit_size)."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """The optimizer's state.

    Attributes:
        resident: What stays on the device.
        paged: What lies in unified memory and may be paged to the host.
        spared: A tensor just below bitsandbytes' threshold has its state in 32 bits, which takes more than a slightly
            larger tensor's in 8 bits. This is that difference, summed over the tensors with 8-bit state: a smaller rank
            may need so much more. At most 24 504 bytes per tensor.
    """

    resident: int
    paged: int
    spared: int


@dataclass(frozen=True, slots=True)
class TrainedBytes:
    """What is trained.

    Attributes:
        parameters: All of them.
        weights: Their bytes; gradients take as many.
        head: Bytes of a head that is trained whole, else 0.
        embedding: The same for the input embedding.
        of_experts: How many of the parameters stand beside routed experts.
    """

    parameters: int
    weights: int
    head: int
    embedding: int
    of_experts: int


@lru_cache(maxsize=1024)
def trained_bytes(shape: ModelShape, part: AdaptedPart, whole_itemsize: int) -> TrainedBytes:
    """Return the size of adapter and whole modules.

    Args:
        shape: The model.
        part: What is trained of it.
        whole_itemsize: Bytes per weight of a module trained whole; the adapter is fp32.
    """
    adapter = sum(count * elements for count, elements in trained_tensors(shape, part))
    whole = sum(count * elements for count, elements in whole_tensors(shape, part))
    size = whole_itemsize * shape.embedding_parameters
    head, embedding = size * part.trains_head, size * part.trains_embedding
    experts = {EXPERTS_UP, EXPERTS_DOWN} & target_names(shape, part.targets, as_peft=part.as_peft)
    of_experts = adapter - sum(count * elements for count, elements in trained_tensors(shape, part, without=experts))
    return TrainedBytes(adapter + whole, 4 * adapter + whole_itemsize * whole, head, embedding, of_experts)


@lru_cache(maxsize=1024)
def optimizer_bytes(
    shape: ModelShape, part: AdaptedPart, optimizer: str, whole_itemsize: int = 4, *, pages: bool = True
) -> OptimizerBytes:
    """Return the bytes of AdamW's two moments, tensor by tensor as bitsandbytes decides.

    Args:
        shape: The model.
        part: What is trained of it.
        optimizer: Which AdamW.
        whole_itemsize: Bytes per weight of a module trained whole; torch makes the moments in the weight's format.
        pages: Whether the device has unified memory; on a CPU all state stays where it is (jobs/train/optimizer.py).
    """
    resident = paged = spared = 0
    most_in_32_bits = _moments(_EIGHT_BIT_FROM - 1, optimizer, 4)
    wide = whole_itemsize if optimizer == "adamw_torch" else 4
    adapter, whole = trained_tensors(shape, part), whole_tensors(shape, part)
    tensors = [*((*pair, 4) for pair in adapter), *((*pair, wide) for pair in whole)]
    for count, elements, itemsize in tensors:
        state = _moments(elements, optimizer, itemsize) * count
        if pages and optimizer.startswith("paged") and elements >= _PAGED_FROM:
            paged += state
        else:
            resident += state
        if elements >= _EIGHT_BIT_FROM:
            spared += count * max(0, most_in_32_bits - _moments(elements, optimizer, itemsize))
    return OptimizerBytes(resident, paged, spared)


def _moments(elements: int, optimizer: str, itemsize: int) -> int:
    """Return the bytes of both moments of a trained tensor, each rounded up as the allocator does."""
    return 2 * sum(map(aligned, _moment(elements, optimizer, itemsize)))


def _moment(elements: int, optimizer: str, itemsize: int = 4) -> tuple[int, ...]:
    """Return the bytes of one moment: its values, and for 8 bits one fp32 scale per 256 of them."""
    if "8bit" not in optimizer or elements < _EIGHT_BIT_FROM:
        return (itemsize * elements,)
    return elements, 4 * -(-elements // 256)


def resident_state(elements: int, optimizer: str) -> tuple[int, ...]:
    """Return the bytes of the tensors that AdamW keeps on the device for one trained tensor."""
    paged = optimizer.startswith("paged") and elements >= _PAGED_FROM
    return () if paged else 2 * _moment(elements, optimizer)
