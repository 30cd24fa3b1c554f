"""The GGUF files that were exported from a training run, found by the reports of export and merge runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from studio.core.errors import BadInput, StudioError
from studio.core.export_formats import gguf_formats
from studio.core.text import plain
from studio.probe.gguf_header import read_gguf_header
from studio.runs.atomic import read_object
from studio.runs.job import R, read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest, MergeRequest

_SUFFIX = ".gguf"
_KIND, _ADAPTER = "general.type", "adapter"


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file of a whole model.

    Attributes:
        path: The file.
        form: llama.cpp's file type, such as `q8_0`; empty where it is not known.
        source: Where it comes from, in words.
    """

    path: Path
    form: str
    source: str


def exported_gguf(trained: RunPaths) -> list[GgufFile]:
    """Return the files that were exported from a training run, or from a merge of it, and are still there.

    Of several exports in one format the newest is taken. Runs that cannot be read are passed over.
    """
    root = str(trained.root.absolute())
    runs = list(_siblings(trained))
    merges = (_job(paths, MergeRequest) for paths in runs)
    merged = {merge.out for merge in merges if merge and merge.run == root}
    found: dict[str, GgufFile] = {}
    for paths in runs:
        job = _job(paths, ExportRequest)
        if job is None or job.format not in gguf_formats():
            continue
        if job.run == root or job.source in merged:
            for path in _files(_exported(paths)):
                found[job.format] = GgufFile(path, job.format, f"exported by {plain(paths.name, one_line=True)}")
    return [found[form] for form in gguf_formats() if form in found]


def named_gguf(path: Path) -> GgufFile:
    """Return a file that the user names.

    Raises:
        BadInput: It cannot be read, is no whole GGUF file, or holds an adapter alone.
    """
    if read_gguf_header(path).metadata.get(_KIND) == _ADAPTER:
        raise BadInput(f"{plain(path.name, one_line=True)} holds an adapter alone; wanted the GGUF file of a model.")
    return GgufFile(path, "", f"the file {plain(str(path), one_line=True)}")


def _siblings(trained: RunPaths) -> Iterator[RunPaths]:
    """Yield the runs beside this one, the oldest first."""
    try:
        folders = [folder for folder in trained.root.absolute().parent.iterdir() if folder.is_dir()]
        ordered = sorted(folders, key=lambda folder: (folder.stat().st_mtime, folder.name))
    except OSError:
        return
    yield from (RunPaths(folder) for folder in ordered)


def _job(paths: RunPaths, wanted: type[R]) -> R | None:
    try:
        return read_job(paths, wanted)
    except (StudioError, OSError):
        return None


def _exported(paths: RunPaths) -> Path | None:
    """Return the file or folder that an export run made, by its report; None where it made none."""
    made = read_object(paths.report).get("exported")
    return Path(made) if isinstance(made, str) else None


def _files(out: Path | None) -> list[Path]:
    if out is None:
        return []
    if out.is_file() and out.suffix == _SUFFIX:
        return [out]
    return sorted(out.glob(f"*{_SUFFIX}")) if out.is_dir() else []
