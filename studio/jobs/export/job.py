"""Writes an adapter or a merged model in the format that was asked for, whole or not at all.

What each format is, and how it is checked, stands in its own module; here is what they share: the scratch
directory, an early end, a full disk, the card, the upload.
"""

import errno
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from studio.core.errors import JobFailed, StudioError
from studio.core.events import Finished, Phase, Saved, Started
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.progress import PhaseTeller, read_fingerprint
from studio.jobs.export.answers import Loss
from studio.jobs.export.gguf import base_of, make_gguf
from studio.jobs.export.gguf_folder import write_lora_files, write_model_files
from studio.jobs.export.hub_push import push_folder
from studio.jobs.export.lora_gguf import make_lora_gguf
from studio.jobs.export.model_card import Training, loss_line, model_card
from studio.jobs.export.peft_folder import CARD, write_peft_folder
from studio.jobs.export.quantised import make_quantised
from studio.jobs.export.whole_model import is_adapter, merge_first
from studio.jobs.export.work import Work
from studio.probe.adapter_folder import AdapterFound, find_adapter, run_of_adapter
from studio.probe.export import check_export
from studio.probe.fingerprint import refuse_another_base
from studio.runs.atomic import write_whole
from studio.runs.disk import RESUME, disk_failure
from studio.runs.history import History
from studio.runs.job import ExportRequest, read_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.scratch import export_scratch, only_writer, publish_result
from studio.runs.store import left_over
from studio.runs.worker import Worker

_FULL_BYTES = 10**6
_GGUF = ".gguf"
_MADE = "made"


def export_run(worker: Worker, request: ExportRequest) -> None:
    """Export as asked and leave the whole folder (or the one `.gguf` file) at `request.out`.

    Raises:
        BadInput: The model or the output cannot be used.
        JobFailed: The export failed or does not answer as what it was made from, or the disk is full.
        OSError: The disk is not writable; nothing half-made is left.
    """
    worker.emit(Started, job="export", model=request.source)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    check_export(request)
    out = Path(request.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = export_scratch(out)
    with only_writer(scratch, out):
        scratch.claim(worker.paths)
        work = Work(worker, scratch, PhaseTeller(worker.emit))
        _tell_left_over(work, out.parent)
        _export(work, request, out)


def _tell_left_over(work: Work, folder: Path) -> None:
    """Say what other exports and merges, which were killed, have left in the same folder: they are hidden there."""
    for left in left_over(work.worker.paths.root.parent):
        if left.run != work.worker.paths and left.folders[0].parent == folder:
            work.warn(f"a job that was killed has left {left.words}: {left.advice}")


def _export(work: Work, request: ExportRequest, out: Path) -> None:
    worker, scratch = work.worker, work.folder
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        found = _write(work, request)
        work.heed()
        work.say("saving")
        _publish(scratch / _MADE, out)
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
        return
    except JobFailed as failed:
        # llama.cpp's own words for it differ from step to step; what it has written so far still lies there.
        if failed.kind == "gguf_converter" and shutil.disk_usage(scratch).free < _FULL_BYTES:
            raise _refused(OSError(errno.ENOSPC, ""), out) or failed from failed
        raise
    except Exception as error:
        if refused := _refused(error, out):
            raise refused from error
        raise
    finally:
        work.scratch.clear()
    size = sum(path.stat().st_size for path in [out, *out.rglob("*")] if path.is_file())
    worker.emit(Saved, what="exported", path=str(out), size_bytes=size)
    report = {"exported": str(out), "source": request.source, "format": request.format, **found}
    if request.push:
        worker.emit(Phase, name="uploading", detail=plain(request.push, one_line=True))
        report["pushed"] = push_folder(out, request.push)
    write_whole(worker.paths.report, json.dumps(report, indent=2))
    worker.emit(Finished, outcome="done", result=report)


def _refused(error: Exception, out: Path) -> JobFailed | None:
    """Return our failure where a disk made the error."""
    kept = "nothing of the export was kept"
    advice = f"or export to another --out; to go on with this one: {RESUME}"
    return disk_failure(error, place=out.parent, kept=kept, advice=advice)


def _write(work: Work, request: ExportRequest) -> dict[str, Any]:
    """Write everything into the folder `made`; return what belongs into the report."""
    source, out, made = Path(request.source), Path(request.out), work.folder / _MADE
    adapter = find_adapter(source) if is_adapter(source) else None
    training = _training(request.run)
    if request.format == "peft" and adapter:
        write_peft_folder(adapter, made, out.name, training)
        return {}
    if request.format in ("nf4", "int8"):
        merged = merge_first(work, request) if adapter else source
        loss = make_quantised(work, merged, request.format, made)
        _write_card(made, adapter, training, request, loss)
        return {"loss": asdict(loss) if loss else None}
    made.mkdir()
    file = made / _file_name(out, request.format)
    if request.format == "lora-gguf" and adapter:
        base = base_of(work, request)
        run = request.run or run_of_adapter(source)
        refuse_another_base(run, base, lambda folder: read_fingerprint(work.worker, folder))
        lora = make_lora_gguf(work, adapter, base, file)
        write_lora_files(file, adapter, base, training, lora)
        return lora.report
    gguf = make_gguf(work, request, file)
    write_model_files(gguf, request.format, adapter, training)
    return gguf.report


def _publish(made: Path, out: Path) -> None:
    """Give the result its name: the folder, or of it the one file where a file was asked for."""
    publish_result(made if out.suffix != _GGUF else made / out.name, out, "the export")


def _file_name(out: Path, form: str) -> str:
    """Return the name of the GGUF file: what was asked for, else the folder's, which may end with the format."""
    if out.suffix == _GGUF:
        return out.name
    stem = out.name.removesuffix(f"-{form}") or out.name
    return f"{stem}-{form.upper().replace('LORA-GGUF', 'LoRA')}{_GGUF}"


def _write_card(
    folder: Path, adapter: AdapterFound | None, training: Training, request: ExportRequest, loss: Loss | None
) -> None:
    name = Path(request.out).name
    use = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        "```",
    ]
    checked = [f"{request.format} through bitsandbytes, from the merged 16-bit model", loss_line(loss, "that model")]
    text = model_card(adapter, name, training, checked=checked, use=use, tag="transformers")
    (folder / CARD).write_text(text, encoding="utf-8")


def _training(run: str) -> Training:
    """Return recipe, history and audit of a training run, where they can still be read."""
    if not run:
        return Training()
    paths, history = RunPaths(Path(run)), History()
    try:
        recipe = read_job(paths, Recipe)
        history.fold(read_events(paths.events))
    except (StudioError, OSError):
        return Training()
    return Training(recipe, history, _audit(paths.audit))


def _audit(path: Path) -> dict[str, Any] | None:
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return table if isinstance(table, dict) else None
