"""Measures an audit's variants: estimates the cost, checks the walk, walks, scores.

It also tells progress, keeps its state on disk and stops when asked. An audit that was stopped or killed continues
after the last block that was kept.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from studio.core.audit import Figures, RowFigures, figures_of
from studio.core.errors import BadInput, JobFailed
from studio.core.events import Phase
from studio.jobs.audit.blocks import Parts, disagreement, renumbered
from studio.jobs.audit.kept import KeptWalk
from studio.jobs.audit.rows import AuditRows
from studio.jobs.audit.scores import TokenScores
from studio.jobs.audit.variants import stored_bytes_of
from studio.jobs.audit.walk import TOKENS_AT_ONCE, BlockSeen, Carried, Variant, Walk, batches_of
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.device import job_device, wait_for
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.runs.requests import AuditRequest
from studio.runs.worker import Worker

_PROOF_TOKENS = 24
_PROOF_GAP = 1e-3
"""Largest relative difference of logits at which the walk is taken for the model's own forward pass. Rounding alone
gives 1e-5."""
_FP32_BYTES = 4
_BLOCK_COPIES = 1.3
"""Memory of a block over its size: as stored, and in 4 bits with scales."""
_PARTS_BYTES = 8 * 2**22
"""Memory for the parts in which weights are cast, quantised and compared (`forms`)."""
_TOKEN_NUMBERS = 8
"""fp32 numbers per token and feature of the widest layer while a block runs: inputs, gates, products, attention.
Measured on synthetic Llamas, all constants together are 5 to 15 % above the peak (tests/bench/audit_results.md)."""
_HEAD_BYTES = 6 * 2**24
"""Memory for head rows and logits of two models (`scores`)."""
_PROBE_TOKENS, _PROBE_WIDTH, _PROBE_ROUNDS = 512, 1024, 4
_PROBE_COPY_NUMBERS = 2**22
_SLOWER = (1.0, 2.0)
"""A walk's time over that of its products and copies alone, low and high: casting, quantising, attention and reading
come on top. This range is chosen, not measured."""

Beside = Callable[[Tensor, Tensor], Mapping[str, TokenScores]]
"""Returns figures of further models, by name, from the reference's final hidden states `[tokens, hidden]` and the
tokens that follow them `[tokens]`."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a walk found.

    Attributes:
        task: Figures on the user's rows, by variant.
        neutral: Figures on the neutral text, by variant.
        seen: What rounding did block by block.
        task_rows: Per-token figures on the user's rows, by variant.
    """

    task: dict[str, Figures]
    neutral: dict[str, Figures]
    seen: list[BlockSeen]
    task_rows: dict[str, RowFigures]


@dataclass(frozen=True, slots=True)
class Ground:
    """What all walks of one audit share.

    Attributes:
        worker: Gets the progress, and is asked whether to stop; its folder keeps states.
        weights: The base model.
        parts: Its parts.
        rows: The rows to measure on.
        about: Describes what is measured; a kept state with another description is not used.
    """

    worker: Worker
    weights: FolderWeights
    parts: Parts
    rows: AuditRows
    about: str


def ground_of(
    worker: Worker, request: AuditRequest, weights: FolderWeights, parts: Parts, rows: AuditRows, *about: object
) -> Ground:
    """Return what all walks of an audit share.

    Args:
        worker: Of the audit.
        request: What was asked for.
        weights: The base model.
        parts: Its parts.
        rows: The rows to measure on.
        about: What else the figures depend on; must be possible to write as JSON.

    Raises:
        JobFailed: The tokenizer makes a token that the model has no embedding for.
    """
    embedding: Any = weights.clean.get_input_embeddings()
    known, largest = int(embedding.weight.shape[0]), max(int(example.input_ids.max()) for example in rows.all)
    if largest >= known:
        raise JobFailed(
            "tokenizer_mismatch",
            f"the tokenizer makes token {largest}, but the model has embeddings for {known} tokens only",
            "use the tokenizer that belongs to this model",
        )
    words = json.dumps([asdict(request), *about, rows.found.hashes], sort_keys=True)
    return Ground(worker, weights, parts, rows, words)


@dataclass(frozen=True, slots=True)
class Cost:
    """An estimate of what a walk takes.

    Attributes:
        memory_bytes: Resident memory at the peak, with what the process holds already.
        hidden_bytes: The part of it that is hidden states.
        low_seconds: Time for products, and copies to a card, alone.
        high_seconds: Time with everything that comes on top.
    """

    memory_bytes: int
    hidden_bytes: int
    low_seconds: float
    high_seconds: float

    def told(self, began: float) -> dict[str, Any]:
        """Return the estimate for the report, with what the audit really took; `began` is a `time.perf_counter`."""
        resident_bytes = int(psutil.Process().memory_info().rss)
        return {**asdict(self), "seconds": time.perf_counter() - began, "resident_bytes": resident_bytes}


def check_cost(ground: Ground, variants: Sequence[Variant], *, alone: bool) -> Cost:
    """Emit what a walk is expected to take, and make sure that there is enough memory.

    Args:
        ground: What the walks of the audit share.
        variants: All variants.
        alone: Whether one variant's blocks are also run on the reference's hidden states.

    Raises:
        BadInput: There is not enough memory.
    """
    stored_bytes = stored_bytes_of(ground.weights)
    cost = cost_of(
        ground.parts, variants, ground.rows.all, device=job_device("auto"), alone=alone, stored_bytes=stored_bytes
    )
    detail = (
        f"about {cost.memory_bytes / 2**30:.1f} GiB of memory, of which hidden states "
        f"{cost.hidden_bytes / 2**30:.2f} GiB; {cost.low_seconds:.0f} to {cost.high_seconds:.0f} s (estimates)"
    )
    ground.worker.emit(Phase, name="estimated", detail=detail)
    check_room(cost)
    return cost


def prove(ground: Ground, variant: Variant) -> float:
    """Return the relative difference of the walk's logits from the model's own forward pass, on the start of a row.

    Raises:
        JobFailed: It is too large: this family does something between its blocks that the walk does not.
    """
    ids = torch.from_numpy(ground.rows.all[0].input_ids[:_PROOF_TOKENS]).long()[None]
    used = sorted(set(ids.flatten().tolist()))
    embedding, places = variant.embed(used), renumbered(ids, used)
    gap = disagreement(
        ground.parts, variant.read, variant.head, embedding=embedding, ids=places, device=job_device("auto")
    )
    if not gap <= _PROOF_GAP:
        raise JobFailed(
            "not_block_by_block",
            f"run block by block, this model's logits differ from its own forward pass by {gap:.1%} of the largest",
            "this family cannot be audited yet; report its name",
        )
    return gap


def measure(
    ground: Ground,
    variants: Sequence[Variant],
    *,
    kept_as: str,
    alone: str = "",
    beside: Beside | None = None,
    share: tuple[float, float] = (0.0, 1.0),
) -> Measured:
    """Walk all variants through the model and return their figures.

    Args:
        ground: What the walks of the audit share.
        variants: The first one is the reference.
        kept_as: Name of the folder that keeps the state.
        alone: The variant whose blocks are also run on the reference's hidden states, one at a time; empty for none.
        beside: Measures models that are not walked.
        share: Where this walk begins and ends in the progress of the whole audit, 0 to 1.

    Raises:
        Cancelled: The user asked for a stop; the state is kept.
        JobFailed: A hidden state is not finite.
        OSError: The disk is full or not writable.
    """
    worker, rows = ground.worker, ground.rows
    kept = KeptWalk(worker.paths.audit_parts / kept_as, ground.about)
    walk = Walk(ground.parts, variants, rows.all, device=job_device("auto"), alone=alone, carried=kept.load())
    low, high = share

    def tell(fraction: float, detail: str) -> None:
        worker.emit(Phase, name="auditing", fraction=low + (high - low) * 0.9 * fraction, detail=detail)

    def stopping(carried: Carried) -> bool:
        asked = worker.requested("stop")
        kept.keep(carried, now=asked)
        return asked

    if not walk.run(tell, stopping):
        raise Cancelled("stopped; resuming goes on after the last whole block")
    kept.keep(walk.carried)
    tenths = -1

    def tell_head(fraction: float) -> None:
        nonlocal tenths
        if int(10 * fraction) > tenths:
            tenths = int(10 * fraction)
            worker.emit(Phase, name="auditing", fraction=low + (high - low) * (0.9 + 0.1 * fraction), detail="head")

    finals = walk.finals()
    scores = walk.scores(tell_head, finals)
    if beside:
        scores |= beside(finals[variants[0].name], walk.targets())
    task, neutral = ({name: _by_row(one, part, rows) for name, one in scores.items()} for part in ("task", "neutral"))
    reference = variants[0].name
    return Measured(
        {name: figures_of(found, task[reference]) for name, found in task.items()},
        {name: figures_of(found, neutral[reference]) for name, found in neutral.items()},
        walk.carried.seen,
        task,
    )


def _by_row(scores: TokenScores, part: str, rows: AuditRows) -> RowFigures:
    counts = [int((example.labels[1:] != IGNORED).sum()) for example in rows.all]
    first = len(rows.task) if part == "neutral" else 0
    last = len(counts) if part == "neutral" else len(rows.task)
    split = (torch.split(one.double().cpu(), counts) for one in (scores.loss, scores.kl, scores.same))
    loss, kl, same = ([row.tolist() for row in one[first:last]] for one in split)
    return RowFigures(loss, kl, same)


def cost_of(
    parts: Parts,
    variants: Sequence[Variant],
    examples: Sequence[Example],
    *,
    device: torch.device,
    alone: bool,
    stored_bytes: int,
) -> Cost:
    """Return an estimate of what a walk takes.

    Args:
        parts: The model.
        variants: All variants.
        examples: All rows.
        device: Where the blocks will run.
        alone: Whether one variant's blocks are also run on the reference's hidden states.
        stored_bytes: Bytes of a weight in the files.
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
        # All variants' weights are copied to the card, and all hidden states there and back at each block.
        moved = sum(blocks) * stored_bytes * len(variants) + 2 * len(blocks) * int(tokens) * int(hidden) * _FP32_BYTES
        seconds += moved / _bytes_moved_per_second(device)
    return Cost(memory, hidden_bytes, seconds * _SLOWER[0], seconds * _SLOWER[1])


def check_room(cost: Cost) -> None:
    """Make sure that there is enough memory.

    Raises:
        BadInput: There is not; the message says what would take less.
    """
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if cost.memory_bytes > free:
        raise BadInput(
            f"the audit would take about {cost.memory_bytes / 1e9:.1f} GB of memory, of which hidden states "
            f"{cost.hidden_bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free. Fewer --rows, a shorter --seq or fewer "
            "--forms need less."
        )


def _products_per_second(device: torch.device) -> float:
    """Return the floating-point operations per second of an fp32 product on a device; a multiply-add counts as two."""
    one = torch.randn(_PROBE_TOKENS, _PROBE_WIDTH, device=device)
    other = torch.randn(_PROBE_WIDTH, _PROBE_WIDTH, device=device)
    took = _seconds_of(lambda: torch.mm(one, other), device)
    return 2 * _PROBE_TOKENS * _PROBE_WIDTH**2 / took


def _bytes_moved_per_second(device: torch.device) -> float:
    """Return the bytes per second at which pageable memory is copied to a device, measured now."""
    numbers = torch.zeros(_PROBE_COPY_NUMBERS)
    return numbers.nbytes / _seconds_of(lambda: numbers.to(device), device)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one round. A first round is not counted, and the device is waited for at both readings."""
    work()
    wait_for(device)
    began = time.perf_counter()
    for _ in range(_PROBE_ROUNDS):
        work()
    wait_for(device)
    return max(time.perf_counter() - began, 1e-9) / _PROBE_ROUNDS
