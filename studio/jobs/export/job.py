"""Writes an adapter or a merged model in the format that was asked for, completely or not at all.

Each format, and how it is checked, is in a module of its own; only the plainest, an adapter as it is, is here. The rest
is what all formats share: the scratch directory, an early end, a full disk, the upload.
"""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from studio.core.errors import JobFailed
from studio.core.events import Finished, Phase, Saved, Started
from studio.core.export_formats import gguf_formats
from studio.core.text import plain
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.export.gguf import write_gguf
from studio.jobs.export.lora_gguf import write_lora_gguf
from studio.jobs.export.model_card import CARD, adapter_card, training_of
from studio.jobs.export.quantised import write_quantised
from studio.jobs.export.work import GGUF, Work
from studio.probe.adapter_folder import find_adapter
from studio.probe.export import check_export
from studio.probe.hub_transfer import push_folder
from studio.runs.atomic import write_whole
from studio.runs.disk import RESUME, disk_failure
from studio.runs.layout import ADAPTER_CONFIG
from studio.runs.requests import ExportRequest
from studio.runs.scratch import export_scratch, only_writer, publish_result
from studio.runs.store import left_over
from studio.runs.worker import Worker


def write_peft_folder(work: Work, made: Path) -> dict[str, Any]:
    """Copy an adapter's files byte by byte and write its card.

    Args:
        work: The export.
        made: A new folder.

    Returns:
        An empty table: the report needs nothing more.

    Raises:
        BadInput: The source is no adapter.
        OSError: The disk is full or not writable.
    """
    adapter = work.adapter or find_adapter(work.source)
    made.mkdir()
    for path in sorted(adapter.folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name != CARD:
            shutil.copyfile(path, made / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, made / path.name)
    card = adapter_card(adapter, Path(work.request.out).name, training_of(work.request.run))
    (made / CARD).write_text(card, encoding="utf-8")
    return {}


WRITERS: dict[str, Callable[[Work, Path], dict[str, Any]]] = {
    "peft": write_peft_folder,
    "lora-gguf": write_lora_gguf,
    "nf4": write_quantised,
    "int8": write_quantised,
    **dict.fromkeys(gguf_formats(), write_gguf),
}
"""The function that writes each format: it fills a new folder, and returns its part of the report."""
_FULL_BYTES = 10**6


def export_run(worker: Worker, request: ExportRequest) -> None:
    """Export as asked and publish the complete folder, or the one `.gguf` file, at `request.out`.

    Raises:
        BadInput: The model or the output cannot be used.
        JobFailed: The export failed, does not answer like its source, or the disk is full.
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
        source = Path(request.source)
        adapter = find_adapter(source) if (source / ADAPTER_CONFIG).is_file() else None
        work = Work(worker, request, adapter, scratch, PhaseTeller(worker.emit))
        _tell_left_over(work, out.parent)
        _export(work, out)


def _tell_left_over(work: Work, folder: Path) -> None:
    """Warn of what killed exports and merges have left in the same folder: it is hidden there and takes space."""
    for left in left_over(work.worker.paths.root.parent):
        if left.run != work.worker.paths and left.folders[0].parent == folder:
            work.warn(f"a job that was killed has left {left.words}: {left.advice}")


def _export(work: Work, out: Path) -> None:
    worker, request, scratch, made = work.worker, work.request, work.folder, work.folder / "made"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        found = WRITERS[request.format](work, made)
        work.heed()
        work.say("saving")
        publish_result(made if out.suffix != GGUF else made / out.name, out, "the export")
    except Cancelled:
        worker.emit(Finished, outcome="stopped")
        return
    except JobFailed as failed:
        # llama.cpp has a different message for a full disk in each step. What it wrote is still there, so the disk is
        # asked instead.
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
    """Return a failure with advice if the disk caused the error, else None."""
    kept = "nothing of the export was kept"
    advice = f"or export to another --out; to go on with this one: {RESUME}"
    return disk_failure(error, place=out.parent, kept=kept, advice=advice)
