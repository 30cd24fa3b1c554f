"""What an audit will take, before it begins: memory from sizes, time from products and copies on the very device."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from studio.core.errors import BadInput
from studio.jobs.audit.batches import TOKENS_AT_ONCE, batches_of
from studio.jobs.audit.blocks import Parts
from studio.jobs.audit.device import wait_for
from studio.jobs.audit.sweep import Variant
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example

_FP32_BYTES = 4
_BLOCK_COPIES = 1.3
"""A block as stored, and its 4-bit twin with scales."""
_PARTS_BYTES = 8 * 2**22
"""Parts in which weights are cast, rounded and compared (`forms`, `rounding`)."""
_TOKEN_NUMBERS = 8
"""Per token and feature of the widest layer while a block runs, fp32: inputs, gates, products, attention. Measured on
synthetic Llamas, all constants together are 5 to 15 % above the peak (tests/bench/audit_results.md)."""
_HEAD_BYTES = 6 * 2**24
"""Head rows and logits of two models (`scores`)."""
_PROBE_TOKENS, _PROBE_WIDTH, _PROBE_ROUNDS = 512, 1024, 4
_PROBE_COPY_NUMBERS = 2**22
_SLOWER = (1.0, 2.0)
"""Walk over bare products and copies, a choice: casting, rounding, attention and reading come on top."""


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate.

    Attributes:
        memory_bytes: Resident at the peak, what the process takes already included.
        hidden_bytes: Of it, hidden states.
        low_seconds: If products, and a card's copies, were all.
        high_seconds: With what comes on top.
    """

    memory_bytes: int
    hidden_bytes: int
    low_seconds: float
    high_seconds: float


def cost_of(
    parts: Parts,
    variants: Sequence[Variant],
    examples: Sequence[Example],
    *,
    device: torch.device,
    alone: bool,
    stored_bytes: int,
) -> Cost:
    """Return what a walk takes.

    Args:
        parts: The model.
        variants: All of them.
        examples: All rows.
        device: Where the blocks will run.
        alone: Whether one variant's blocks are also run on the reference's hidden states.
        stored_bytes: Of a weight in the files.
    """
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for _, block in parts.blocks]
    widest = max(max(p.shape) for _, block in parts.blocks for p in block.parameters())
    hidden = parts.causal.get_submodule(parts.head).weight.shape[1]  # type: ignore[index]
    padded = {by_row: sum(b.ids.numel() for b in batches_of(examples, by_row=by_row)) for by_row in (False, True)}
    tokens = sum(padded[variant.by_row] for variant in variants) + (padded[False] if alone else 0)
    hidden_bytes = int(tokens) * int(hidden) * _FP32_BYTES
    wanted = sum(int((example.labels[1:] != IGNORED).sum()) for example in examples)
    hidden_bytes += wanted * int(hidden) * _FP32_BYTES * len(variants)
    longest = max(TOKENS_AT_ONCE, *(len(example.input_ids) for example in examples))
    memory = (
        psutil.Process().memory_info().rss
        + int(max(blocks) * stored_bytes * _BLOCK_COPIES)
        + max(_PARTS_BYTES + longest * widest * _FP32_BYTES * _TOKEN_NUMBERS, _HEAD_BYTES)
        + hidden_bytes
    )
    products = 2 * tokens * sum(blocks)
    seconds = products / _products_per_second(device)
    if device.type != "cpu":
        # Every variant's weights go there, and before and after each block the hidden states of all rows.
        moved = sum(blocks) * stored_bytes * len(variants) + 2 * len(blocks) * int(tokens) * int(hidden) * _FP32_BYTES
        seconds += moved / _bytes_moved_per_second(device)
    return Cost(memory, hidden_bytes, seconds * _SLOWER[0], seconds * _SLOWER[1])


def check_room(cost: Cost) -> None:
    """Make sure that there is memory for it.

    Raises:
        BadInput: There is not; says what would take less.
    """
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if cost.memory_bytes > free:
        raise BadInput(
            f"the audit would take about {cost.memory_bytes / 1e9:.1f} GB of memory, of which hidden states "
            f"{cost.hidden_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free. Fewer --rows, a shorter --seq or fewer "
            "--forms need less."
        )


def _products_per_second(device: torch.device) -> float:
    """Return multiply-adds, counted as two, per second of an fp32 product on a device, now."""
    one = torch.randn(_PROBE_TOKENS, _PROBE_WIDTH, device=device)
    other = torch.randn(_PROBE_WIDTH, _PROBE_WIDTH, device=device)
    took = _seconds_of(lambda: torch.mm(one, other), device)
    return 2 * _PROBE_TOKENS * _PROBE_WIDTH**2 / took


def _bytes_moved_per_second(device: torch.device) -> float:
    """Return how fast pageable memory is copied to a device, now."""
    numbers = torch.zeros(_PROBE_COPY_NUMBERS)
    return numbers.nbytes / _seconds_of(lambda: numbers.to(device), device)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return what one round takes: the first one is not counted, and the device has finished at both readings."""
    work()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(_PROBE_ROUNDS):
        work()
    wait_for(device)
    return max(time.perf_counter() - began, 1e-9) / _PROBE_ROUNDS
