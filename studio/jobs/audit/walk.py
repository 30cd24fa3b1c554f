"""One walk of an audit from start to figures: checked, told, kept on disk, stopped when asked."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from studio.core.audit import Figures, RowFigures, figures_of
from studio.core.errors import JobFailed
from studio.core.events import Phase
from studio.jobs.audit.blocks import Parts
from studio.jobs.audit.calls import disagreement, renumbered
from studio.jobs.audit.device import device_of
from studio.jobs.audit.rows import AuditRows
from studio.jobs.audit.scores import TokenScores
from studio.jobs.audit.state import KeptWalk
from studio.jobs.audit.stopped import Stopped
from studio.jobs.audit.sweep import BlockSeen, Carried, Sweep, Variant
from studio.jobs.audit.weights import FolderWeights
from studio.jobs.base.data.labels import IGNORED
from studio.runs.worker import Worker

_PROOF_TOKENS = 24
_PROOF_GAP = 1e-3
"""Relative difference of logits up to which the walk counts as the model's own forward pass; rounding gives 1e-5."""

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
        seconds: Of this process's part of the walk.
    """

    task: dict[str, Figures]
    neutral: dict[str, Figures]
    seen: list[BlockSeen]
    task_rows: dict[str, RowFigures]
    seconds: float


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


def prove(ground: Ground, variant: Variant) -> float:
    """Return how far the walk is from the model's own forward pass on the beginning of a row, relative.

    Raises:
        JobFailed: Too far: this family does something between its blocks that the walk does not.
    """
    ids = torch.from_numpy(ground.rows.all[0].input_ids[:_PROOF_TOKENS]).long()[None]
    used = sorted(set(ids.flatten().tolist()))
    embedding, places = variant.embed(used), renumbered(ids, used)
    gap = disagreement(ground.parts, variant.read, variant.head, embedding=embedding, ids=places, device=device_of())
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
        Stopped: The user asked for it; the state is kept.
        JobFailed: Something is not finite.
        OSError: The disk refuses.
    """
    began = time.perf_counter()
    worker, rows = ground.worker, ground.rows
    kept = KeptWalk(Path(worker.paths.root) / "audit" / kept_as, ground.about)
    sweep = Sweep(ground.parts, variants, rows.all, device=device_of(), alone=alone, carried=kept.load())
    low, high = share

    def tell(fraction: float, detail: str) -> None:
        worker.emit(Phase, name="auditing", fraction=low + (high - low) * 0.9 * fraction, detail=detail)

    def stopping(carried: Carried) -> bool:
        asked = worker.requested("stop")
        kept.keep(carried, now=asked)
        return asked

    if not sweep.run(tell, stopping):
        raise Stopped("stopped; resuming goes on after the last whole block")
    kept.keep(sweep.carried)
    tenths = -1

    def tell_head(fraction: float) -> None:
        nonlocal tenths
        if int(10 * fraction) > tenths:
            tenths = int(10 * fraction)
            worker.emit(Phase, name="auditing", fraction=low + (high - low) * (0.9 + 0.1 * fraction), detail="head")

    finals = sweep.finals()
    scores = sweep.scores(tell_head, finals)
    if beside:
        scores |= beside(finals[variants[0].name], sweep.targets())
    task, neutral = ({name: _by_row(one, part, rows) for name, one in scores.items()} for part in ("task", "neutral"))
    reference = variants[0].name
    return Measured(
        {name: figures_of(found, task[reference]) for name, found in task.items()},
        {name: figures_of(found, neutral[reference]) for name, found in neutral.items()},
        sweep.carried.seen,
        task,
        time.perf_counter() - began,
    )


def _by_row(scores: TokenScores, part: str, rows: AuditRows) -> RowFigures:
    counts = [int((example.labels[1:] != IGNORED).sum()) for example in rows.all]
    first = len(rows.task) if part == "neutral" else 0
    last = len(counts) if part == "neutral" else len(rows.task)
    split = (torch.split(one.double().cpu(), counts) for one in (scores.loss, scores.kl, scores.same))
    loss, kl, same = ([row.tolist() for row in one[first:last]] for one in split)
    return RowFigures(loss, kl, same)
