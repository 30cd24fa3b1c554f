"""Merges a LoRA or QLoRA adapter into its 16-bit base, tensor by tensor, and checks that both answer alike.

A QLoRA adapter is merged into the 16-bit base as well: most of it would be lost if it were added to 4-bit weights and
the sum rounded to 4 bits again.
"""

import json
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from studio.core.events import Finished, Phase, Saved, Started, Warned
from studio.core.text import plain
from studio.jobs.base.closeness import CANNOT_RUN
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.precision import DTYPES
from studio.jobs.base.progress import PhaseTeller, heed
from studio.jobs.base.tokenizer import load_tokenizer
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.jobs.base.weights.streamed import most_lent
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.merge.folder_files import tokenizer_folder, write_folder_files
from studio.jobs.merge.parts import Parts, change_of, find_parts, plan_of, shown_by
from studio.jobs.merge.shards import SHARD_BYTES, ShardWriter, lay_out
from studio.jobs.merge.steps import MergeSteps
from studio.jobs.merge.verify import compare_logits, encode, make_again, read_back, side_by_side, why_not
from studio.jobs.merge.write_steps import write_steps
from studio.probe.space import check_memory
from studio.runs.atomic import write_whole
from studio.runs.disk import RESUME, disk_failure
from studio.runs.requests import MergeRequest
from studio.runs.scratch import merge_scratch, only_writer, publish_result
from studio.runs.worker import Worker

_TEXTS = (
    "The quick brown fox jumps over the lazy dog. A merged model must answer as base and adapter do together.",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) == 5\n",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
_AGAIN = f"or merge to another --out; to go on with this one: {RESUME}"
_UNPUBLISHED = "stopped before the merged model was published"
_MOST_QUESTIONS = 2
_SHOWN_CHARACTERS = 2000
_FAR_KL = 0.05
"""Mean KL in nats per token from which on the user is warned. Rounding a merged 135M model to bf16 gave .0013."""
_FP32_BYTES = 4
_LENT_BYTES = 6
"""Bytes for each number that is lent when answers are compared: 2 as read in 16 bit, and 4 as computed with in fp32."""
_COPIES = 4
"""fp32 copies of a layer at once: the weight, the delta before and after scaling, and 16-bit copies of both."""


@dataclass(frozen=True, slots=True)
class _Prompts:
    """What both models are asked.

    Attributes:
        tokenizer: Of the merged model.
        ids: Token ids of the texts whose logits are compared, `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        questions: Prompts that both answer, from the training run.
    """

    tokenizer: Any
    ids: Tensor
    mask: Tensor
    questions: tuple[str, ...]


def merge_run(worker: Worker, request: MergeRequest) -> None:
    """Merge as asked and publish the complete model folder at `request.out`.

    Raises:
        BadInput: The adapter, the base or the output folder cannot be used, or the disk has no room.
        JobFailed: The merged weights are not finite, or the files are not what was made.
        OSError: The disk is full or not writable; nothing half-made is left.
    """
    worker.emit(Started, job="merge", model=request.base or None)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        parts = find_parts(worker, request)
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
        return
    out = Path(request.out)
    scratch = merge_scratch(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(scratch, out):
        _merge_alone(worker, request, parts, scratch.folder)


def _merge_alone(worker: Worker, request: MergeRequest, parts: Parts, scratch: Path) -> None:
    try:
        _merge(worker, request, parts, scratch)
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
    except Exception as error:
        failure = disk_failure(error, place=scratch.parent, kept="nothing of the merged model was kept", advice=_AGAIN)
        if failure is None:
            raise
        raise failure from error
    finally:
        # The folder stays only if the process is killed. The next merge of the same parts then keeps its whole shards.
        shutil.rmtree(scratch, ignore_errors=True)


def _merge(worker: Worker, request: MergeRequest, parts: Parts, scratch: Path) -> None:
    worker.emit(Phase, name="reading the adapter")
    (adapter, weight), *more = parts.adapters
    skeleton = build_skeleton(parts.folder, adapter, weight, *more)
    dtype = DTYPES.get(request.dtype)
    steps = MergeSteps(skeleton, TensorFiles(parts.folder), dtype=dtype, **change_of(request, parts, skeleton))
    _check_memory(steps)
    shown = shown_by(request.run)
    # Loaded before anything is written, so that a broken tokenizer does not end the merge when all else is done.
    tokenizer = load_tokenizer(tokenizer_folder(adapter.folder, parts.folder))
    ids, mask = encode([f"{asked}\n{expected}" for asked, expected in shown] or _TEXTS, tokenizer, steps)
    prompts = _Prompts(tokenizer, ids, mask, tuple(asked for asked, _ in shown[:_MOST_QUESTIONS]))

    shards = lay_out((output for step in steps.steps for output in step.outputs), SHARD_BYTES)
    tell = _teller(worker)
    merge_scratch(Path(request.out)).claim(worker.paths)
    writer = ShardWriter(
        scratch,
        shards,
        plan_of(request, parts),
        lambda fraction: tell("checking", fraction, "shards of a merge that was killed"),
    )
    write_steps(
        steps,
        writer,
        tell=lambda fraction, shard: tell("merging", fraction, shard),
        stopping=lambda: worker.requested("stop"),
    )
    worker.emit(Phase, name="writing config and tokenizer")
    write_folder_files(
        scratch,
        parts.folder,
        adapter.folder,
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        untied=steps.untied,
        vocabulary=skeleton.vocabulary,
    )
    writer.finish()
    began = time.monotonic()
    verified = _verify(worker, steps, writer, prompts, tell) | _written(steps, parts, scratch, prompts, tell)
    verified["check_seconds"] = round(time.monotonic() - began, 2)
    heed(worker, _UNPUBLISHED)  # the last chance to stop: a published folder stays
    worker.emit(Phase, name="saving")
    out = Path(request.out)
    publish_result(scratch, out, "the merged model")
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
    worker.emit(Finished, outcome="done", result=report | {"side_by_side": _short(report["side_by_side"])})


def _short(written: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the texts of both sides, shortened for the event; report.json has them whole."""
    return [
        {name: text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…" for name, text in one.items()}
        for one in written
    ]


def _verify(
    worker: Worker, steps: MergeSteps, writer: ShardWriter, prompts: _Prompts, tell: Callable[[str, float, str], None]
) -> dict[str, Any]:
    read = read_back(writer, lambda fraction: tell("checking", fraction, "tensors"))
    again = make_again(steps, writer.folder)
    closeness = None
    try:
        closeness = compare_logits(
            steps,
            writer.folder,
            prompts.ids,
            prompts.mask,
            lambda side, fraction: tell("checking", fraction, side),
        )
    except CANNOT_RUN as error:
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
        "tensors": read,
    }


def _written(
    steps: MergeSteps, parts: Parts, scratch: Path, prompts: _Prompts, tell: Callable[[str, float, str], None]
) -> dict[str, Any]:
    """Return the answers of both sides as text, or why there are none: the model may be too large to load whole."""
    if why := why_not(steps):
        return {"side_by_side": [], "no_text": why}
    try:
        written = side_by_side(
            steps,
            parts.adapters,
            scratch,
            prompts.tokenizer,
            questions=prompts.questions,
            tell=lambda fraction, words: tell("checking", fraction, words),
        )
    except CANNOT_RUN as error:
        traceback.print_exception(error)
        return {"side_by_side": [], "no_text": plain(str(error), one_line=True, limit=200)}
    return {"side_by_side": written}


def _teller(worker: Worker) -> Callable[[str, float, str], None]:
    """Return a function that tells progress, and raises `Cancelled` if the user asked for a stop."""
    say = PhaseTeller(worker.emit)

    def tell(name: str, fraction: float, detail: str) -> None:
        heed(worker, _UNPUBLISHED)
        say(name, min(1.0, fraction), detail)

    return tell


def _check_memory(steps: MergeSteps) -> None:
    """Refuse the merge if the memory cannot hold its largest step, or what the comparison afterwards lends at once."""
    largest = max((_elements(steps, place) for place in range(len(steps.steps))), default=0)
    lent = most_lent(steps.skeleton.adapted, steps, "base_model.model.")
    needed = max(largest * _FP32_BYTES * _COPIES, lent * _LENT_BYTES)
    check_memory(
        needed,
        "the largest tensors to be merged need",
        "close other programs, or merge on a computer with more.",
    )


def _elements(steps: MergeSteps, place: int) -> int:
    step = steps.steps[place]
    # Copies and row sums never hold a whole tensor.
    if step.copies is not None or step.row_sum is not None:
        return 0
    return sum(torch.Size(output.shape).numel() for output in step.outputs)
