"""Merges a LoRA or QLoRA adapter into its 16-bit base, tensor by tensor, and proves that the result behaves like both.

A QLoRA adapter is merged into the 16-bit base as well: adding it to 4-bit weights and rounding again loses most of it.
"""

import errno
import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor

from studio.core.errors import BadInput, JobFailed, StudioError
from studio.core.events import Finished, Phase, Sampled, Saved, Started, Warned
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.load import FourBit, base_folder, four_bit_of, load_tokenizer
from studio.jobs.base.weights.dequantized import quantised_parameters, through_four_bits
from studio.jobs.base.weights.skeleton import Skeleton, Weighted, build_skeleton
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.merge.folder_files import tokenizer_folder, write_folder_files
from studio.jobs.merge.memory import check_memory
from studio.jobs.merge.shards import SHARD_BYTES, ShardWriter, lay_out
from studio.jobs.merge.side_by_side import side_by_side, why_not
from studio.jobs.merge.steps import MergeSteps
from studio.jobs.merge.verify import compare_logits, encode, recompute_sample
from studio.jobs.merge.write_steps import Stopped, write_steps
from studio.probe.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterFound,
    adapter_of_checkpoint,
    find_adapter,
    run_of_adapter,
)
from studio.probe.fingerprint import fingerprint, recorded_fingerprint
from studio.probe.models import BaseFound, find_base
from studio.probe.start import check_merge, refuse_another_base, refuse_quantised
from studio.runs.atomic import publish_folder, write_whole
from studio.runs.job import MergeRequest, read_job
from studio.runs.layout import RunPaths
from studio.runs.log import DISK_FULL, read_events
from studio.runs.worker import Worker

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TEXTS = (
    "The quick brown fox jumps over the lazy dog. A merged model must answer as base and adapter do together.",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) == 5\n",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_RUN = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError)
_MOST_TEXTS, _MOST_QUESTIONS = 6, 2
_FAR_KL = 0.05
"""Nats per token. Rounding a merged 135M model to bf16 gave .0013."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a merge is made of."""

    base: BaseFound
    folder: Path
    adapters: tuple[Weighted, ...]
    trained: Recipe | None

    @property
    def adapter(self) -> AdapterFound:
        """The first one, whose tokenizer the merged model gets."""
        return self.adapters[0][0]


@dataclass(frozen=True, slots=True)
class _Prompts:
    """What both models are asked: texts as ids `[batch, seq]`, and questions of the user."""

    tokenizer: Any
    ids: Tensor
    mask: Tensor
    questions: tuple[str, ...]


def merge_run(worker: Worker, request: MergeRequest) -> None:
    """Merge as asked and leave the whole model folder at `request.out`.

    Raises:
        BadInput: The adapter, the base or the output folder cannot be used, or the disk has no room.
        JobFailed: The merged weights are not finite, or the files are not what was made.
        OSError: The disk is full or not writable; nothing half-made is left.
    """
    worker.emit(Started, job="merge", model=request.base or None)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    parts = _find(worker, request)
    out = Path(request.out)
    aside = out.with_name(f".merging-{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".merging-{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"another merge is writing {out.name} already: wait for it, or choose another --out") from None
    try:
        _merge(worker, request, parts, aside)
    except Stopped:
        worker.emit(Finished, outcome="stopped")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise JobFailed(
            DISK_FULL,
            f"the disk of {plain(str(out.parent), one_line=True)} is full: nothing of the merged model was kept",
            "free some space, or choose another --out, and merge again",
        ) from error
    finally:
        # Only a kill leaves the folder: the next merge of the same parts takes up its whole shards.
        shutil.rmtree(aside, ignore_errors=True)
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()


def _find(worker: Worker, request: MergeRequest) -> _Parts:
    worker.emit(Phase, name="finding the base model")
    adapters = tuple((find_adapter(_folder_of(worker, request, folder)), by) for folder, by in request.weighted)
    adapter = adapters[0][0]
    word = request.base or adapter.base
    if not word:
        raise BadInput(f"{Path(request.adapter).name} names no base model; say which one with --base")
    check_merge(request)
    base = find_base(word, request.revision)
    refuse_quantised(base)
    folder = base_folder(base, lambda name, fraction: worker.emit(Phase, name=name, fraction=fraction))
    for run in {request.run, *(run_of_adapter(Path(path)) for path, _ in request.weighted)}:
        refuse_another_base(run, folder)
    trained_on = recorded_fingerprint(request.run)
    if trained_on and not trained_on.get("quantized") and trained_on.get("config") != fingerprint(folder)["config"]:
        worker.emit(
            Warned,
            topic="base",
            message="the base's weights are those that were trained on, but its config.json is not: the merged model "
            "gets the one that is there now.",
        )
    return _Parts(base, folder, adapters, _recipe_of(request.run))


def _folder_of(worker: Worker, request: MergeRequest, adapter: str) -> Path:
    """Return the folder of an adapter; that of a checkpoint is made in the run, from the adapter's own."""
    if not request.checkpoint or adapter != request.adapter:
        return Path(adapter)
    return adapter_of_checkpoint(Path(request.checkpoint), Path(adapter), worker.paths.root / "checkpoint-adapter")


def _merge(worker: Worker, request: MergeRequest, parts: _Parts, aside: Path) -> None:
    worker.emit(Phase, name="reading the adapter")
    (adapter, weight), *more = parts.adapters
    skeleton = build_skeleton(parts.folder, adapter, weight, *more)
    dtype = _DTYPES.get(request.dtype)
    steps = MergeSteps(skeleton, TensorFiles(parts.folder), dtype=dtype, **_onto(request, parts, skeleton))
    check_memory(steps)
    shown = _shown_by(request.run)
    # Before anything is written: a tokenizer that cannot be loaded should not be found out at the end.
    tokenizer = load_tokenizer(tokenizer_folder(adapter.folder, parts.folder))
    ids, mask = encode([f"{asked}\n{expected}" for asked, expected in shown] or _TEXTS, tokenizer, steps)
    prompts = _Prompts(tokenizer, ids, mask, tuple(asked for asked, _ in shown[:_MOST_QUESTIONS]))

    def stopping() -> bool:
        return worker.requested("stop")

    shards = lay_out((output for step in steps.steps for output in step.outputs), SHARD_BYTES)
    writer = ShardWriter(aside, shards, _plan(request, parts))
    write_steps(steps, writer, tell=_teller(worker), stopping=stopping)
    worker.emit(Phase, name="writing config and tokenizer")
    write_folder_files(
        aside,
        parts.folder,
        adapter.folder,
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        untied=steps.untied,
        vocabulary=skeleton.vocabulary,
    )
    writer.finish()
    began = time.monotonic()
    verified = _verify(worker, steps, writer, prompts) | _written(worker, steps, parts, aside, prompts)
    verified["check_seconds"] = round(time.monotonic() - began, 2)
    if stopping():
        raise Stopped("stopped before the merged model was published")
    worker.emit(Phase, name="saving")
    out = Path(request.out)
    publish_folder(aside, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    worker.emit(Saved, what="merged", path=str(out), size_bytes=size)
    report = {
        "merged": str(out),
        "adapter": str(adapter.folder) if request.checkpoint else request.adapter,
        "adapters": [{"adapter": folder, "weight": by} for folder, by in request.weighted],
        "checkpoint": request.checkpoint,
        "base": parts.base.word,
        "onto": request.onto,
        "dtype": request.dtype,
        "untied": steps.untied,
        "kept_shards": sorted(writer.done),
        "prompts": "from the run" if shown else "built in",
        **verified,
    }
    write_whole(worker.paths.report, json.dumps(report, indent=2))
    worker.emit(Finished, outcome="done", result=report)


def _verify(worker: Worker, steps: MergeSteps, writer: ShardWriter, prompts: _Prompts) -> dict[str, Any]:
    worker.emit(Phase, name="checking", detail="tensors")
    aside = writer.folder
    again = recompute_sample(steps, aside, writer.done)
    closeness = None
    try:
        closeness = compare_logits(
            steps, aside, prompts.ids, prompts.mask, lambda detail: worker.emit(Phase, name="checking", detail=detail)
        )
    except _CANNOT_RUN as error:
        traceback.print_exception(error)
        message = f"the answers could not be compared: this model cannot be run layer by layer ({error})"
        worker.emit(Warned, topic="merge", message=plain(message, one_line=True, limit=400))
    if closeness and closeness.mean_kl > _FAR_KL:
        worker.emit(
            Warned,
            topic="merge",
            message=f"the merged model differs from base and adapter by {closeness.mean_kl:.3f} nats a token: rounding "
            "to the base's format took a part of the adapter. Compare with --dtype fp32.",
        )
    return {
        "closeness": asdict(closeness) if closeness else None,
        "recomputed_tensors": again,
        "tensors": sum(len(step.outputs) for step in steps.steps),
    }


def _written(worker: Worker, steps: MergeSteps, parts: _Parts, aside: Path, prompts: _Prompts) -> dict[str, Any]:
    """Text of both sides, where the model is small enough to be loaded whole."""
    if why := why_not(steps):
        return {"side_by_side": [], "no_text": why}
    worker.emit(Phase, name="checking", detail="text")
    try:
        written = side_by_side(steps, parts.adapters, aside, prompts.tokenizer, prompts.questions)
    except _CANNOT_RUN as error:
        traceback.print_exception(error)
        return {"side_by_side": [], "no_text": plain(str(error), one_line=True, limit=200)}
    return {"side_by_side": written}


def _onto(request: MergeRequest, parts: _Parts, skeleton: Skeleton) -> dict[str, Any]:
    """What is done to the base before the adapter is added."""
    if request.onto == "original":
        return {}
    model = parts.trained.model if parts.trained else None
    quant = four_bit_of(model) if model else FourBit()
    named = _DTYPES.get(model.dtype) if model else None
    return {
        "change": through_four_bits(quant, named or torch.bfloat16),
        "changed": quantised_parameters(skeleton.clean, quant.skip),
    }


def _teller(worker: Worker) -> Callable[[float, str], None]:
    """Tell progress in hundredths: a large model has thousands of tensors."""
    last = -1

    def tell(fraction: float, shard: str) -> None:
        nonlocal last
        if int(100 * fraction) > last:
            last = int(100 * fraction)
            worker.emit(Phase, name="merging", fraction=min(1.0, fraction), detail=shard)

    return tell


def _plan(request: MergeRequest, parts: _Parts) -> str:
    """Everything that the merged bytes depend on: shards of another plan are not taken up again."""
    files = sorted(path for path in parts.folder.iterdir() if path.suffix in {".safetensors", ".json"})
    seen = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    sums = [
        (by, *(_sum(adapter.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)))
        for adapter, by in parts.adapters
    ]
    recipe = parts.trained.model if parts.trained and request.onto != "original" else None
    return json.dumps([str(parts.folder), seen, sums, request.dtype, request.onto, str(recipe), torch.__version__])


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recipe_of(run: str) -> Recipe | None:
    """Return the recipe of the run that the adapter comes from, where it can still be read."""
    if not run:
        return None
    try:
        job = read_job(RunPaths(Path(run)))
    except (StudioError, OSError):
        return None
    return job if isinstance(job, Recipe) else None


def _shown_by(run: str) -> list[tuple[str, str]]:
    """Return prompts and the answers in the data, as the training run showed them."""
    if not run or not RunPaths(Path(run)).events.is_file():
        return []
    seen: dict[int, tuple[str, str]] = {}
    for event in read_events(RunPaths(Path(run)).events):
        if isinstance(event, Sampled) and event.prompt.strip():
            seen[event.index] = (event.prompt, event.expected)
    return list(seen.values())[:_MOST_TEXTS]
