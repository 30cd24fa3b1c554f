"""One walk of an audit from start to figures: checked, told, kept on disk, stopped when asked.

An audit that was stopped or killed goes on after the last block that was kept.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.audit import Figures, RowFigures, figures_of
from studio.core.errors import JobFailed
from studio.core.events import Phase
from studio.jobs.audit.blocks import Parts, Rounding
from studio.jobs.audit.calls import disagreement, renumbered
from studio.jobs.audit.device import device_of
from studio.jobs.audit.rows import AuditRows
from studio.jobs.audit.scores import TokenScores
from studio.jobs.audit.sweep import BlockSeen, Carried, Sweep, Variant
from studio.jobs.audit.weights import FolderWeights
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.failures import Cancelled
from studio.runs.atomic import mend_folder, publish_folder
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
        Cancelled: The user asked for it; the state is kept.
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
        raise Cancelled("stopped; resuming goes on after the last whole block")
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


_EVERY_SECONDS = 60.0
_STATES, _WALK = "states.safetensors", "walk.json"


class KeptWalk:
    """The kept state of one walk.

    Attributes:
        folder: Where it lies; it appears whole.
    """

    def __init__(self, folder: Path, about: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Look for the state of an earlier process.

        Args:
            folder: Where it lies.
            about: Says what is measured; a state of something else is thrown away.
            clock: Seconds.
        """
        self.folder, self._about, self._clock = folder, about, clock
        self._kept_at = clock()
        mend_folder(folder)

    def load(self) -> Carried | None:
        """Return the state; None where there is none that can be used."""
        try:
            table = json.loads((self.folder / _WALK).read_text("utf-8"))
            if table["about"] == self._about:
                hidden: dict[str, list[Tensor]] = {}
                for number, _ in enumerate(table["variants"]):
                    hidden |= _by_variant(load_file(self.folder / f"{number:03d}-{_STATES}"))
                return Carried(hidden, [_seen(entry) for entry in table["seen"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            pass  # as good as none: the walk begins again
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def keep(self, carried: Carried, *, now: bool = False) -> None:
        """Keep the state once a minute, or now.

        Raises:
            OSError: The disk refuses; the state that was kept before stays.
            SafetensorError: Likewise, in safetensors' own class.
        """
        if not now and self._clock() - self._kept_at < _EVERY_SECONDS:
            return
        aside = self.folder.with_name(f".{self.folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            self._write(aside, carried)
            publish_folder(aside, self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._kept_at = self._clock()

    def _write(self, aside: Path, carried: Carried) -> None:
        for number, (name, batches) in enumerate(carried.hidden.items()):
            # A file a variant: while it is written, safetensors holds a copy of all that goes into it.
            tensors = {f"{name}|{place:06d}": states.contiguous() for place, states in enumerate(batches)}
            save_file(tensors, aside / f"{number:03d}-{_STATES}")
        seen = [asdict(one) for one in carried.seen]
        (aside / _WALK).write_text(json.dumps({"about": self._about, "variants": list(carried.hidden), "seen": seen}))

    def forget(self) -> None:
        """Take the state away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _by_variant(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    hidden: dict[str, list[Tensor]] = {}
    for key in sorted(tensors):
        hidden.setdefault(key.rpartition("|")[0], []).append(tensors[key])
    return hidden


def _seen(entry: dict[str, object]) -> BlockSeen:
    roundings: dict[str, dict[str, dict[str, float]]] = entry.pop("roundings")  # type: ignore[assignment]
    made = {
        variant: {name: Rounding(**values) for name, values in linears.items()}  # type: ignore[arg-type]
        for variant, linears in roundings.items()
    }
    return BlockSeen(roundings=made, **entry)  # type: ignore[arg-type]
