"""Finds what a merge is made of: adapters, their base, and what was recorded when they were trained."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.core.errors import BadInput, StudioError
from studio.core.events import Phase, Warned
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.load import FourBit, base_folder, four_bit_of
from studio.jobs.base.precision import DTYPES
from studio.jobs.base.progress import read_fingerprint
from studio.jobs.base.weights.dequantized import quantised_parameters, through_four_bits, turned_parameters
from studio.jobs.base.weights.pissa import write_difference
from studio.jobs.base.weights.skeleton import Skeleton, Weighted
from studio.probe.adapter_folder import AdapterFound, adapter_of_checkpoint, find_adapter, run_of_adapter
from studio.probe.fingerprint import recorded_fingerprint, refuse_another_base
from studio.probe.merge import base_of_merge, check_merge, refuse_quantised
from studio.probe.models import BaseFound
from studio.runs.job import read_job
from studio.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.watch import read_history
from studio.runs.worker import Worker

_MOST_TEXTS = 6


@dataclass(frozen=True, slots=True)
class Parts:
    """What a merge is made of.

    Attributes:
        base: The base, as it was named.
        folder: The folder that holds the base.
        adapters: The adapters, and what each one's delta is multiplied by.
        trained: The recipe of the run that made the adapter; None where it is not known.
    """

    base: BaseFound
    folder: Path
    adapters: tuple[Weighted, ...]
    trained: Recipe | None

    @property
    def adapter(self) -> AdapterFound:
        """The first adapter; the merged model gets its tokenizer."""
        return self.adapters[0][0]


def find_parts(worker: Worker, request: MergeRequest) -> Parts:
    """Return the parts of a merge, after checking each of them.

    Raises:
        BadInput: An adapter is not complete, the base is another or cannot be merged into, or the output folder is not
            empty.
        Cancelled: The user asked for a stop while the base was read.
    """
    worker.emit(Phase, name="finding the base model")
    adapters = tuple((find_adapter(_folder_of(worker, request, folder)), by) for folder, by in request.weighted)
    adapter = adapters[0][0]
    word = request.base or adapter.base
    if not word:
        raise BadInput(f"{Path(request.adapter).name} names no base model; say which one with --base")
    check_merge(request)
    base = base_of_merge(word, request.revision)
    refuse_quantised(base)
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    look = cache(lambda place: read_fingerprint(worker, place))
    for run in {request.run, *(run_of_adapter(Path(path)) for path, _ in request.weighted)} - {""}:
        refuse_another_base(run, folder, look)
        if recorded_fingerprint(run) is None:
            name = plain(Path(run).name, one_line=True)
            message = f"the run {name} does not say which weights it was trained on: the base could not be compared"
            worker.emit(Warned, topic="base", message=message)
    trained_on = recorded_fingerprint(request.run)
    if trained_on and not trained_on.get("quantized") and trained_on.get("config") != look(folder)["config"]:
        worker.emit(
            Warned,
            topic="base",
            message="the base's weights are those that were trained on, but its config.json is not: the merged model "
            "gets the one that is there now.",
        )
    return Parts(base, folder, adapters, _recipe_of(request.run))


def shown_by(run: str) -> list[tuple[str, str]]:
    """Return the sample prompts that a training run answered, with the answers in the data; empty without a run."""
    if not run or not RunPaths(Path(run)).events.is_file():
        return []
    seen: dict[int, tuple[str, str]] = {}
    for event in read_history(RunPaths(Path(run))).samples:
        if event.prompt.strip():
            seen[event.index] = (event.prompt, event.expected)
    return list(seen.values())[:_MOST_TEXTS]


def change_of(request: MergeRequest, parts: Parts, skeleton: Skeleton) -> dict[str, Any]:
    """Return the arguments of `MergeSteps` for a change of the base before the adapter is added.

    Empty where the adapter is merged into the original base. Otherwise the base's linear layers are quantised to 4 bits
    and dequantised, as the training run had them.
    """
    if request.onto == "original":
        return {}
    model = parts.trained.model if parts.trained else None
    quant = four_bit_of(model) if model else FourBit()
    named = DTYPES.get(model.dtype) if model else None
    rounded = through_four_bits(quant, named or torch.bfloat16)
    turned = turned_parameters(skeleton.clean, quant.precision)

    # 4-bit loading transposes Conv1D weights, and blocks of 64 weights are then other ones.
    def change(name: str, weight: Tensor) -> Tensor:
        return rounded(name, weight.t()).t() if name in turned else rounded(name, weight)

    return {"change": change, "changed": quantised_parameters(skeleton.clean, quant.precision) | turned}


def plan_of(request: MergeRequest, parts: Parts) -> str:
    """Return everything that the merged bytes depend on, as a text; shards of another plan are not used again."""
    files = sorted(path for path in parts.folder.iterdir() if path.suffix in {".safetensors", ".json"})
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    sums = [
        (by, *(_sum(adapter.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)))
        for adapter, by in parts.adapters
    ]
    recipe = parts.trained.model if parts.trained and request.onto != "original" else None
    return json.dumps([str(parts.folder), seen, sums, request.dtype, request.onto, str(recipe), torch.__version__])


def _folder_of(worker: Worker, request: MergeRequest, adapter: str) -> Path:
    """Return the folder of an adapter; for a checkpoint an adapter folder is made in the merge's own run folder."""
    if not request.checkpoint or adapter != request.adapter:
        return Path(adapter)
    into = worker.paths.checkpoint_adapter
    return adapter_of_checkpoint(Path(request.checkpoint), Path(adapter), into, write_difference)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recipe_of(run: str) -> Recipe | None:
    """Return the recipe of the run that made the adapter; None without a run, or where it cannot be read."""
    if not run:
        return None
    try:
        return read_job(RunPaths(Path(run)), Recipe)
    except (StudioError, OSError):
        return None
