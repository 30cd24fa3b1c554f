"""Quantises a merged 16-bit model with bitsandbytes and compares the two; or writes an adapter with its card.

Always from 16 bits: quantising what went through 4 bits before loses the adapter again (measured: KL 1.99).
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from studio.core.errors import BadInput, JobFailed, StudioError
from studio.core.events import Finished, Phase, Saved, Started
from studio.core.recipe import Recipe
from studio.jobs.base.load import load_tokenizer
from studio.jobs.export.peft_folder import write_peft_folder
from studio.probe.adapter_folder import find_adapter
from studio.probe.export import check_export
from studio.runs.atomic import publish_folder, write_whole
from studio.runs.history import History
from studio.runs.job import ExportRequest, read_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.worker import Worker

_TEXTS = (
    "The quick brown fox jumps over the lazy dog. A quantised model should answer as the merged one does.",
    "def add(a, b):\n    return a + b\n\n\nassert add(2, 3) == 5\n",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
)
_MOST_TOKENS = 96
_KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".md", ".py")
_WRITTEN_ANEW = ("config.json", "generation_config.json", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Loss:
    """The quantised model against the merged one on fixed texts: KL in nats per token, share of equal top tokens."""

    tokens: int
    mean_kl: float
    same_top_token: float


def export_run(worker: Worker, request: ExportRequest) -> None:
    """Quantise as asked and leave the whole folder at `request.out`.

    Raises:
        BadInput: The model or the output folder cannot be used.
        JobFailed: The quantised model's answers are not finite, or no layer could be quantised.
        OSError: The disk is full or not writable; nothing half-made is left.
    """
    worker.emit(Started, job="export", model=request.source)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    check_export(request)
    source, out = Path(request.source), Path(request.out)
    if request.format == "peft":
        _export_adapter(worker, request)
        return
    tokenizer = load_tokenizer(source)
    worker.emit(Phase, name="loading the merged model")
    wanted = _answers(_load(source), tokenizer)
    aside = out.with_name(f".writing-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        worker.emit(Phase, name="quantising", detail=request.format)
        model = _load(source, _bits(request.format))
        _require_quantised(model, request.format)
        worker.emit(Phase, name="saving")
        model.save_pretrained(str(aside))
        del model
        _keep_files(source, aside)
        if worker.requested("stop"):
            worker.emit(Finished, outcome="stopped")
            return
        worker.emit(Phase, name="checking", detail="loading it again")
        loss = _compare(_answers(_load(aside), tokenizer), wanted)
        publish_folder(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    worker.emit(Saved, what="exported", path=str(out), size_bytes=size)
    report = {"exported": str(out), "source": request.source, "format": request.format, "loss": asdict(loss)}
    write_whole(worker.paths.report, json.dumps(report, indent=2))
    worker.emit(Finished, outcome="done", result=report)


def _export_adapter(worker: Worker, request: ExportRequest) -> None:
    out = Path(request.out)
    aside = out.with_name(f".writing-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    worker.emit(Phase, name="saving")
    recipe, history = _of_run(request.run)
    try:
        write_peft_folder(find_adapter(Path(request.source)), aside, out.name, recipe, history)
        publish_folder(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    worker.emit(Saved, what="exported", path=str(out), size_bytes=size)
    report = {"exported": str(out), "source": request.source, "format": request.format}
    write_whole(worker.paths.report, json.dumps(report, indent=2))
    worker.emit(Finished, outcome="done", result=report)


def _of_run(run: str) -> tuple[Recipe | None, History | None]:
    """Return recipe and history of a training run, where it can still be read."""
    if not run:
        return None, None
    paths, history = RunPaths(Path(run)), History()
    try:
        job = read_job(paths)
        history.fold(read_events(paths.events))
    except (StudioError, OSError):
        return None, None
    return (job if isinstance(job, Recipe) else None), history


def _bits(form: str) -> BitsAndBytesConfig:
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _load(folder: Path, bits: BitsAndBytesConfig | None = None) -> Any:
    """Return the model on the CPU; a folder that is quantised already says so itself."""
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    options = {"quantization_config": bits} if bits else {}
    try:
        return from_pretrained(folder, dtype="auto", device_map={"": "cpu"}, use_safetensors=True, **options).eval()
    except (ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        raise BadInput(f"the model cannot be loaded: {type(error).__name__}: {error}") from error


def _require_quantised(model: Any, form: str) -> None:
    """Raise where bitsandbytes found nothing to quantise.

    Raises:
        JobFailed: No layer was.
    """
    kind = "Linear8bitLt" if form == "int8" else "Linear4bit"
    if not any(type(module).__name__ == kind for module in model.modules()):
        raise JobFailed(
            "nothing_quantised",
            "no layer of this model could be quantised: bitsandbytes converts torch.nn.Linear only",
            "use the merged 16-bit model as it is",
        )


def _keep_files(source: Path, aside: Path) -> None:
    """Copy tokenizer, chat template and what else lies beside the weights, byte by byte."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _KEPT_SUFFIXES and path.name not in _WRITTEN_ANEW:
            shutil.copyfile(path, aside / path.name)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any) -> Tensor:
    """Return fp32 logits `[tokens, vocabulary]` of the fixed texts."""
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:_MOST_TOKENS] for text in _TEXTS]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


def _compare(quantised: Tensor, merged: Tensor) -> Loss:
    if not bool(torch.isfinite(quantised).all()):
        raise JobFailed("exported_nonfinite", "the quantised model's logits hold NaN or infinity", "use another format")
    kl = kl_div(log_softmax(quantised, -1), log_softmax(merged, -1), log_target=True, reduction="none").sum(-1)
    same = (quantised.argmax(-1) == merged.argmax(-1)).float().mean()
    return Loss(tokens=merged.shape[0], mean_kl=max(0.0, float(kl.mean())), same_top_token=float(same))
