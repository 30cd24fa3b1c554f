"""How a job's exception is named in the run's log, and what the user can do about it."""

import errno
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from studio.core.errors import BadInput, JobFailed
from studio.core.text import plain
from studio.runs.disk import RESUME, disk_failure, os_errno
from studio.runs.native import CARD_LOST, native_failure

BAD_INPUT = "bad_input"
"""The kind of failure when the job was given something that it cannot work with."""

OUT_OF_MEMORY = "out_of_memory"
"""The kind of failure when the card's or the computer's memory is full."""

Explain = Callable[[BaseException], JobFailed | None]
"""Returns our failure for an exception of the job's libraries, such as weights that cannot be read, or None."""

Stage = Literal["load", "work", "optimizer", "eval", "save"]
"""What a job was doing, as far as advice depends on it; `work` is its main part, such as forward and backward."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What a job was doing when it failed.

    Attributes:
        job: Its kind: train, merge, export, audit, measure or chat; empty where it is not known yet.
        phase: The name in its last `Phase` event.
    """

    job: str = ""
    phase: str = ""


_STAGE_OF_PHASE: tuple[tuple[str, Stage], ...] = (
    ("finding", "load"),
    ("reading", "load"),
    ("loading", "load"),
    ("starting", "load"),
    ("converting the embedded", "load"),
    ("evaluating", "eval"),
    ("answering", "eval"),
    ("saving", "save"),
    ("writing", "save"),
)
_OPTIMIZERS = ("torch.optim.", "bitsandbytes.optim.")
_WHILE: dict[Stage, str] = {
    "load": " while loading",
    "work": "",
    "optimizer": " in the optimizer's step",
    "eval": " while evaluating",
    "save": " while saving",
}
_CLOSE = "close other programs that hold memory (see lora-studio gpus)"
_TRAIN: dict[Stage, str] = {
    "load": f"{_CLOSE}; use method qlora, which holds the base in 4 bits; or take a smaller base model",
    "work": "cheapest first: halve train.micro_batch and double train.accumulation (same result), which a run with "
    "train.on_oom = shrink does by itself; set "
    "train.recompute to all; shorten train.seq_len; use an 8-bit optimizer; use method qlora",
    "optimizer": "use an 8-bit or paged optimizer (train.optimizer); lower adapter.rank; adapt fewer layers "
    "(adapter.targets, adapter.layers)",
    "eval": "halve train.micro_batch and double train.accumulation (same result); shorten train.seq_len; lower "
    "eval.sample_tokens, or leave samples out with eval.samples = 0",
    "save": f"{_CLOSE}: saving copies the adapter and the optimizer's numbers into the computer's memory; then "
    f"continue with: {RESUME}",
}
_ADVICE: dict[str, dict[Stage, str]] = {
    "train": _TRAIN,
    "measure": {**_TRAIN, "work": f"the recipe does not fit here. {_TRAIN['work'].capitalize()}"},
    "merge": {
        "work": "close other programs, or merge on a computer with more memory; --dtype bf16 takes half of fp32's"
    },
    "export": {
        "work": "close other programs, or export on a computer with more memory; of an adapter, merge first with "
        "lora-studio merge, which needs the room of its largest tensors alone, and export the merged model"
    },
    "audit": {
        "load": f"{_CLOSE}, or audit on a computer with more memory",
        "eval": f"{_CLOSE}; audit with --answers 0 to leave answers out, then continue or start again",
        "work": f"{_CLOSE}; shorten --seq; lower --rows; of a run, leave parts out with --no-speed and --answers 0",
    },
    "chat": {
        "load": "close other programs, or use --device cpu, --tuned-only or a smaller model",
        "work": "begin a new conversation, ask something shorter, or lower --max-tokens",
    },
}
_ANY_JOB = "close other programs that hold memory, or use a smaller model"
_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",  # torch's allocator on a CPU, a plain RuntimeError
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "status_alloc_failed",
    "paging file is too small",
)


def not_explained(error: BaseException) -> JobFailed | None:
    """Explain nothing: for a job whose libraries raise no errors of their own."""
    del error
    return None


def failure_of(error: BaseException | None, explain: Explain, doing: Doing = Doing()) -> JobFailed:
    """Return the failure that an exception means; None stands for a job that ended without a terminal event.

    Full memory, a full disk and a lost card are told the same way, whichever library raised the exception.
    """
    match error:
        case None:
            return JobFailed("no_result", "the job ended without saying how", "Report this: it is a fault of ours.")
        case JobFailed():
            return error
        case BadInput():
            return JobFailed(BAD_INPUT, str(error), "Correct it and start a new run.")
    if ran_out_of_memory(error):
        return memory_failure(error, doing)
    native = native_failure(str(error)) if isinstance(error, Exception) else None
    return disk_failure(error) or _explained(error, explain) or native or _by_type(error)


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the memory of the card or of the computer was not enough.

    By name and text, since torch has a class of its own for cards only, and asking must not import torch.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if os_errno(error) == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, OSError)) and out_of_memory_in(str(error))


def of_the_machine(error: BaseException) -> bool:
    """Return whether an exception is about memory or the card, so that it says nothing about what was tried."""
    return ran_out_of_memory(error) or (isinstance(error, Exception) and native_failure(str(error)) is not None)


def leaves_no_other_way(error: BaseException) -> bool:
    """Return whether trying another way is useless: the memory is full, or this process has lost the card."""
    native = native_failure(str(error)) if isinstance(error, Exception) else None
    return ran_out_of_memory(error) or (native is not None and native.kind in CARD_LOST)


def out_of_memory_in(text: str) -> bool:
    """Return whether a library's text says that memory was not enough."""
    lower = text.lower()
    return any(word in lower for word in _MEMORY_WORDS)


def memory_failure(error: BaseException, doing: Doing) -> JobFailed:
    """Return the failure of an exception for which `ran_out_of_memory` holds, with advice for what the job did."""
    text = str(error)
    on_card = type(error).__name__ == "OutOfMemoryError" or any(word in text for word in ("CUDA", "CUBLAS", "CUDNN"))
    return memory_failure_of(text, doing, on_card=on_card, stage=stage_of(error, doing))


def memory_failure_of(text: str, doing: Doing, *, on_card: bool, stage: Stage | None = None) -> JobFailed:
    """Return the failure of a full memory.

    Args:
        text: The library's words; may be empty.
        doing: What the job was doing.
        on_card: Whether it is the card's memory, or the computer's.
        stage: The stage, where it is known better than by the job's last phase.
    """
    stage = stage or stage_of(None, doing)
    said = plain(text, one_line=True, limit=400) if text else ""
    whose = "the card's" if on_card else "the computer's"
    during = f"{whose} memory is full{_WHILE[stage]}{f': {said}' if said else ''}"
    return JobFailed(OUT_OF_MEMORY, during, memory_advice(doing.job, stage))


def memory_advice(job: str, stage: Stage) -> str:
    """Return what helps a kind of job that ran out of memory at a stage."""
    known = _ADVICE.get(job, {})
    return known.get(stage) or known.get("work") or _ANY_JOB


def stage_of(error: BaseException | None, doing: Doing) -> Stage:
    """Return what a job was doing: the optimizer is known by the exception's traceback, the rest by the last phase."""
    modules = [
        str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__ if error else None)
    ]
    if any(f"{name}.".startswith(_OPTIMIZERS) for name in modules):
        return "optimizer"
    return next((stage for begins, stage in _STAGE_OF_PHASE if doing.phase.startswith(begins)), "work")


def _explained(error: BaseException, explain: Explain) -> JobFailed | None:
    """Return what `explain` makes of an error; None where it fails itself, as when it imports a broken library."""
    try:
        return explain(error)
    except Exception:  # noqa: BLE001  whatever it is, the first error is the one to tell
        return None


def _by_type(error: BaseException) -> JobFailed:
    if isinstance(error, KeyboardInterrupt):
        return JobFailed("interrupted", "interrupted before the job could stop in order", f"Continue with: {RESUME}")
    what = "".join(traceback.format_exception_only(error)).strip()
    return JobFailed("error", what, "The traceback is at the end of output.log in the run's folder.")
