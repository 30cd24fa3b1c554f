"""What pairs are compared with in DPO: their answers' log-probabilities under the base, computed once.

The adapter is switched off meanwhile, so that one base in memory serves both. A pair's value never changes, and each
pair that the run will see is measured once, before the first step, without gradients: never more passes than a
measurement in every step needs, and from the second epoch on fewer. The values are kept in the run's folder. A resumed
run reads them there: measured again, in batches of other rows, they would round otherwise.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from studio.core.events import Warned
from studio.jobs.base.progress import PhaseTeller, heed
from studio.jobs.train.batches import Batcher
from studio.jobs.train.objectives import Encoded
from studio.jobs.train.objectives.pairs import Pair, Pairs
from studio.jobs.train.read_rows import Rows
from studio.jobs.train.step_model import StepModel, evaluating
from studio.runs.atomic import write_whole
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker

_PHASE = "measuring the base on the pairs"
_PART = 4096
"""Pairs that are in memory together, where they lie on disk."""

Values = NDArray[np.float32]
"""Log-probabilities of chosen and rejected answers `[pairs, 2]`, in nats; NaN where they are not known."""


def with_reference(
    worker: Worker, tell: PhaseTeller, step_model: StepModel, rows: Rows, *, seen: Sequence[int], batcher: Batcher
) -> Rows:
    """Return the rows with their reference, measured where the run does not know it yet.

    Args:
        worker: Of the run, whose folder keeps the values.
        tell: Told what is being done.
        step_model: The model and its objective.
        rows: Pairs to train on, and held-out ones.
        seen: Places of the pairs that the run trains on; the others may stay unknown.
        batcher: How pairs become batches: as training's do.

    Raises:
        Cancelled: The user asked for an early end.
    """
    parts = {
        "train": (rows.train, np.asarray(seen, np.int64)),
        "held_out": (rows.held_out, np.arange(len(rows.held_out))),
    }
    kept = _kept(worker.paths)
    values = {
        name: kept[name].copy()
        if name in kept and len(kept[name]) == len(pairs)
        else np.full((len(pairs), 2), np.nan, "f4")
        for name, (pairs, _) in parts.items()
    }
    missing = {name: wanted[np.isnan(values[name][wanted]).any(1)].tolist() for name, (_, wanted) in parts.items()}
    if count := sum(map(len, missing.values())):
        detail, done = f"{count} pairs, with the adapter switched off", 0
        tell(_PHASE, 0.0, detail=detail)
        with evaluating(step_model):
            # Held-out pairs by themselves: in the batches of an evaluation their rounding is the same.
            for name, start in ((name, at) for name, places in missing.items() for at in range(0, len(places), _PART)):
                some = missing[name][start : start + _PART]
                pairs = [cast(Pair, parts[name][0][place]) for place in some]
                places = {id(pair): place for pair, place in zip(pairs, some, strict=True)}
                for group in batcher.groups(pairs):
                    found = step_model.reference(batcher.batch(group)).cpu().numpy()
                    for pair, value in zip(group, found, strict=True):
                        values[name][places[id(pair)]] = value
                    done += len(group)
                    tell(_PHASE, done / count, detail=detail)
                    heed(worker, "stopped while the base was measured on the pairs")
        _keep(worker, values)
    return replace(rows, train=_told(rows.train, values["train"]), held_out=_told(rows.held_out, values["held_out"]))


def _told(pairs: Sequence[Encoded], values: Values) -> Sequence[Encoded]:
    return Pairs(pairs.sides, values) if isinstance(pairs, Pairs) else pairs


def _keep(worker: Worker, values: Mapping[str, Values]) -> None:
    try:
        write_whole(worker.paths.reference, save(dict(values)))
    except OSError as error:
        message = f"the base's log-probabilities are not kept; a resumed run measures them again: {error}"
        worker.emit(Warned, topic="disk", message=message)


def _kept(paths: RunPaths) -> dict[str, Values]:
    """Return the values from the run's first start; nothing where there are none, or the file is damaged."""
    with suppress(OSError, SafetensorError, ValueError):
        return load_file(paths.reference)
    return {}
