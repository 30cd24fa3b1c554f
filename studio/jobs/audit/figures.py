"""The figures of an audit's variants: estimated, proven, walked, scored, told, kept on disk, stopped when asked.

An audit that was stopped or killed goes on after the last block that was kept.
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
"""Relative difference of logits up to which the walk counts as the model's own forward pass; rounding gives 1e-5."""
_FP32_BYTES = 4
_BLOCK_COPIES = 1.3
"""A block as stored, and its 4-bit twin with scales."""
_PARTS_BYTES = 8 * 2**22
"""Parts in which weights are cast, rounded and compared (`forms`)."""
_TOKEN_NUMBERS = 8
"""Per token and feature of the widest layer while a block runs, fp32: inputs, gates, products, attention. Measured on
synthetic Llamas, all constants together are 5 to 15 % above the peak (tests/bench/audit_results.md)."""
_HEAD_BYTES = 6 * 2**24
"""Head rows and logits of two models (`scores`)."""
_PROBE_TOKENS, _PROBE_WIDTH, _PROBE_ROUNDS = 512, 1024, 4
_PROBE_COPY_NUMBERS = 2**22
_SLOWER = (1.0, 2.0)
"""Walk over bare products and copies, a choice: casting, rounding, attention and reading come on top."""

Beside = Callable[[Tensor, Tensor], Mapping[str, TokenScores]]
"""Figures of further models by name, from the reference's final states `[tokens, hidden]` and the tokens after them."""


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
    """What every walk of one audit shares.

    Attributes:
        worker: Told the progress, asked whether to stop; its folder keeps states.
        weights: The base model.
        parts: Its parts.
        rows: What is measured on.
        about: Says what is measured: a kept state of something else is not taken up.
    """

    worker: Worker
    weights: FolderWeights
    parts: Parts
    rows: AuditRows
    about: str


def ground_of(
    worker: Worker, request: AuditRequest, weights: FolderWeights, parts: Parts, rows: AuditRows, *about: object
) -> Ground:
    """Return what the walks of an audit stand on.

    Args:
        worker: Of the audit.
        request: What was asked for.
        weights: The base model.
        parts: Its parts.
        rows: What is measured on.
        about: What else the figures depend on, as JSON has it.

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

    def told(self, began: float) -> dict[str, Any]:
        """Return what a report says of it, with what the audit has taken; `began` is on `time.perf_counter`."""
        resident_bytes = int(psutil.Process().memory_info().rss)
        return {**asdict(self), "seconds": time.perf_counter() - began, "resident_bytes": resident_bytes}


def check_cost(ground: Ground, variants: Sequence[Variant], *, alone: bool) -> Cost:
    """Say what a walk is expected to take, and make sure that there is memory for it.

    Raises:
        BadInput: There is not.
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
    """Return how far the walk is from the model's own forward pass on the beginning of a row, relative.

    Raises:
        JobFailed: Too far: this family does something between its blocks that the walk does not.
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
    """Walk and score.

    Args:
        ground: What the audit stands on.
        variants: The first one is the reference.
        kept_as: Name of the state's folder.
        alone: The variant whose blocks are also run alone.
        beside: Measures models that are not walked.
        share: The part of the whole audit that this walk is.

    Raises:
        Cancelled: The user asked for it; the state is kept.
        JobFailed: Something is not finite.
        OSError: The disk refuses.
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
