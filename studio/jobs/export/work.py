"""What every export needs, whatever its format: run and request, a scratch directory, the merged model, llama.cpp.

Merging is a job of its own, so an export starts one, as a run inside its own run's folder, and waits for its end.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studio.core.errors import JobFailed
from studio.core.events import Phase, Warned
from studio.core.text import plain
from studio.jobs.base.closeness import CANNOT_RUN, FEWEST_TOKENS, MOST_TOKENS, Closeness, compare, padded
from studio.jobs.base.llama.gguf_tools import ensure_tools
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.load import base_folder
from studio.jobs.base.progress import PhaseTeller, heed
from studio.jobs.base.weights.streamed import folder_logits
from studio.probe.adapter_folder import AdapterFound, run_of_adapter
from studio.probe.models import find_base
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.last_words import crash_of
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.scratch import Scratch, merged_for
from studio.runs.status import Status, run_status
from studio.runs.supervise import launch, resume, stop
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, SystemPrompt, read_system_prompt
from studio.runs.watch import RunWatch
from studio.runs.worker import Worker

TEXTS = (
    "The quick brown fox jumps over the lazy dog. A quantised model should answer as the merged one does.",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) == 5\n",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
"""Texts on which an export is compared with its source."""
GGUF = ".gguf"
_WORK = 2e11
"""Most parameters times tokens of one forward pass: a few seconds on two cores."""
_MERGE = "studio.jobs.merge"
"""The merge job's module, by name because jobs do not import each other."""
_POLL_SECONDS = 0.2
_STOP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Work:
    """An export while it is running.

    Attributes:
        worker: Of the export's run.
        request: What was asked for.
        adapter: The adapter that is exported; None where the source is a merged model.
        scratch: The scratch directory, which is deleted at the end.
        say: Tells what is being done.
    """

    worker: Worker
    request: ExportRequest
    adapter: AdapterFound | None
    scratch: Scratch
    say: PhaseTeller

    @property
    def folder(self) -> Path:
        """The folder for temporary files."""
        return self.scratch.folder

    @property
    def source(self) -> Path:
        """The folder of the adapter or the merged model."""
        return Path(self.request.source)

    @property
    def file_name(self) -> str:
        """The name of the GGUF file: the one asked for, else made of the folder's name and the format."""
        out, form = Path(self.request.out), self.request.format
        if out.suffix == GGUF:
            return out.name
        stem = out.name.removesuffix(f"-{form}") or out.name
        return f"{stem}-{form.upper().replace('LORA-GGUF', 'LoRA')}{GGUF}"

    @property
    def run(self) -> str:
        """The folder of the training run behind the source; empty where it is not known."""
        return self.request.run or (run_of_adapter(self.source) if self.adapter else "")

    @property
    def trained_with(self) -> SystemPrompt:
        """What the rows of the training begin with."""
        return read_system_prompt(RunPaths(Path(self.run))) if self.run else NO_SYSTEM_PROMPT

    def tell_system(self, carried: tuple[str, str]) -> dict[str, Any]:
        """Return the report's words on the system prompt in a Modelfile; warn where the training's cannot be there.

        Args:
            carried: The prompt and where it is from: `modelfile.system_of`.
        """
        trained, (text, origin) = self.trained_with, carried
        if trained.usual and origin != "training":
            self.warn(
                "the training's system prompt has characters that a Modelfile cannot hold: give it where the model is "
                "served"
            )
        return {"text": text, "from": origin, "rows": trained.rows, "of": trained.of}

    def warn(self, message: str) -> None:
        """Warn the user."""
        self.worker.emit(Warned, topic="export", message=plain(message, one_line=True, limit=400))

    def heed(self) -> None:
        """Raise if the user asked for an early end.

        Raises:
            Cancelled: The user asked for an early end.
        """
        heed(self.worker, "stopped before the export was published")

    def llama(self) -> LlamaTool:
        """Return llama.cpp's tools; fetch them first where that has not been done.

        Raises:
            BadInput: The folder that the user named does not hold the tools.
            JobFailed: The tools could not be fetched.
        """
        return LlamaTool(ensure_tools(self.say, self.heed), self.worker.paths.tool_log, self.heed)

    def base(self) -> Path:
        """Return the folder of the adapter's base; download or convert it first where needed.

        Raises:
            BadInput: The base is not found, or cannot be downloaded.
        """
        word = self.request.base or (self.adapter.base if self.adapter else "")
        return base_folder(find_base(word, self.request.revision), self.say)

    def merged(self) -> Path:
        """Return the merged 16-bit model: the source if it is one, else one that is merged now from the adapter.

        Raises:
            JobFailed: The merge failed; the message gives its reason.
        """
        return _merge_first(self) if self.adapter else self.source


def tokens_for(size_bytes: float) -> float:
    """Return how many tokens a model of this size in 16 bit can read in seconds."""
    return min(MOST_TOKENS, max(FEWEST_TOKENS, _WORK / max(1.0, size_bytes / 2)))


def merged_answers(work: Work, merged: Path, rows: Sequence[Sequence[int]]) -> Tensor | None:
    """Return the merged model's fp32 logits `[tokens, vocabulary]`, with a few rows of its matrices in memory.

    Returns:
        None, with a warning, where the model cannot be run layer by layer.
    """
    work.say("checking", detail="answers of the merged model")
    ids, mask = padded(rows)
    try:
        return folder_logits(merged, ids, mask)[mask.bool()]
    except CANNOT_RUN as error:
        work.warn(f"the answers could not be compared: this model cannot be run layer by layer ({error})")
        return None


def loss_of(exported: Tensor, merged: Tensor) -> Closeness:
    """Return how close an export is to the merged model, from the logits of both, `[tokens, vocabulary]`.

    Raises:
        JobFailed: A logit of the exported model is not finite.
    """
    if not bool(torch.isfinite(exported).all()):
        raise JobFailed("exported_nonfinite", "the exported model's logits hold NaN or infinity", "use another format")
    return compare(exported, merged)


def _merge_first(work: Work) -> Path:
    """Merge the adapter into a folder beside the export's output; the merge's progress and warnings are passed on."""
    asked = work.request
    paths, out = RunPaths(work.worker.paths.merge), merged_for(Path(asked.out))
    if run_status(paths) is Status.finished:
        if out.is_dir():
            return out
        shutil.rmtree(paths.root)  # the model was deleted meanwhile
    if not paths.recipe.is_file():
        shutil.rmtree(out, ignore_errors=True)
        paths.root.mkdir(mode=0o700, exist_ok=True)
        merge = MergeRequest(asked.source, asked.base, str(out), asked.revision, onto=asked.onto, run=asked.run)
        write_job(paths, merge)
        launch(paths, _MERGE)
    elif not run_status(paths).live:
        resume(paths, module=_MERGE)  # an earlier process of this export was killed; whole shards are used again
    watch = RunWatch(paths)
    try:
        while (events := watch.poll()) or run_status(paths).live:
            for event in events:
                if isinstance(event, Phase):
                    work.say(f"merge: {event.name}", event.fraction, event.detail)
                elif isinstance(event, Warned):
                    work.warn(event.message)
            work.heed()
            if not events:
                time.sleep(_POLL_SECONDS)
    except BaseException:
        stop(paths, grace_seconds=_STOP_SECONDS)  # or its model would appear later, and nobody would delete it
        raise
    watch.catch_up()
    if failed := watch.history.failed:
        raise JobFailed(failed.failure, f"the merge before the export failed: {failed.message}", failed.advice)
    if watch.history.finished is None or not out.is_dir():
        raise _ended_early(paths, watch.history)
    return out


def _ended_early(paths: RunPaths, history: History) -> JobFailed:
    """Return why the merge's process ended without an event, from what it printed last if that tells."""
    if known := crash_of(paths, history):
        # The user must resume the export, not the merge: whoever shows the message replaces RUN by the export's name.
        advice = known.advice.replace(f"resume {paths.name}", "resume RUN")
        return JobFailed(known.kind, f"the merge before the export ended early: {known}", advice)
    where = plain(str(paths.output), one_line=True)
    return JobFailed("merge_crashed", "the merge before the export ended early", f"look at the end of {where}")
