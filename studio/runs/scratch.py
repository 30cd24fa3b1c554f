"""Scratch directories: hidden folders beside an output, where a merge or an export writes until the result is whole.

Only a job that was killed leaves them behind. A job holds a lock file beside its scratch directory, so that no two
write there, and so that what a killed job has left is not taken for what a living one needs.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from studio.core.errors import BadInput, JobFailed, StudioError
from studio.core.text import plain
from studio.runs.atomic import publish_new
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.status import Status, run_status

_MOST_TWINS = 1000


@dataclass(frozen=True, slots=True)
class Scratch:
    """The scratch directory of one output, with the lock and the note of its owner beside it.

    Attributes:
        folder: The scratch directory.
        merged: The merged model that an export of an adapter starts from; None for a merge.
    """

    folder: Path
    merged: Path | None = None

    @property
    def lock(self) -> Path:
        """The lock that a job holds while it writes here."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    @property
    def owner(self) -> str:
        """The name of the run that wrote here last; empty where it is not known."""
        try:
            return self._claim.read_text("utf-8")
        except (OSError, ValueError):
            return ""

    @property
    def _claim(self) -> Path:
        # A file of its own: an attempt to take the lock empties the lock's file, and the folder becomes the result.
        return self.folder.with_name(f"{self.folder.name}.run")

    @property
    def held(self) -> bool:
        """Whether a living job writes here: this one's, or the merge before an export, which may outlive the export."""
        return lock_held(self.lock) or (self.merged is not None and merge_scratch(self.merged).held)

    @property
    def folders(self) -> list[Path]:
        """The folders that exist, those of the merge before an export included."""
        merged = [self.merged, merge_scratch(self.merged).folder] if self.merged else []
        return [folder for folder in (self.folder, *merged) if folder.is_dir()]

    def claim(self, paths: RunPaths) -> None:
        """Note that what lies here belongs to a run, even if another run that was killed has left it.

        Raises:
            OSError: Nothing can be written there.
        """
        self._claim.write_text(paths.name, "utf-8")

    def disclaim(self) -> None:
        """Delete the note of the owner, when nothing is left here."""
        with suppress(OSError):
            self._claim.unlink()

    def clear(self) -> None:
        """Delete all that lies here, as far as the disk allows."""
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self.merged is not None and not merge_scratch(self.merged).held:
            merge_scratch(self.merged).disclaim()
            with suppress(OSError):
                merge_scratch(self.merged).lock.unlink()


def merge_scratch(out: Path) -> Scratch:
    """Return where a merge writes before its model appears at `out`."""
    return Scratch(out.with_name(f".merging-{out.name}"))


def export_scratch(out: Path) -> Scratch:
    """Return where an export writes before its result appears at `out`."""
    return Scratch(out.with_name(f".writing-{out.name}"), merged_for(out))


def merged_for(out: Path) -> Path:
    """Return where the merged model lies that an export to `out` starts from."""
    return out.with_name(f".merged-for-{out.name}")


@contextmanager
def only_writer(scratch: Scratch, out: Path) -> Iterator[None]:
    """Hold the lock of a scratch directory, so that no other job writes there.

    Args:
        scratch: The scratch directory; the folder around it exists.
        out: The output, for messages.

    Raises:
        BadInput: Another job holds it, or nothing can be written there.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415  0.1 s, and lists of runs import this module to look only

    lock = FileLock(scratch.lock)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not scratch.lock.exists():
            shown = plain(str(out.parent), one_line=True)
            raise BadInput(f"nothing can be written in {shown}: choose another --out") from None
        shown = plain(out.name, one_line=True)
        raise BadInput(f"another job is writing {shown} already: wait for it, or choose another --out") from None
    try:
        yield
    finally:
        if not scratch.folder.exists():
            scratch.disclaim()
        lock.release()
        with suppress(OSError):
            scratch.lock.unlink()


def publish_result(made: Path, out: Path, what: str) -> None:
    """Give a result the name that was asked for. Where something else has got that name meanwhile, both are kept.

    Args:
        made: The whole folder or file.
        out: The name that was asked for.
        what: The result in words, such as `the merged model`.

    Raises:
        JobFailed: The name was taken, and the result got the next free one.
        OSError: The disk refuses.
    """
    stem, suffix = (out.stem, out.suffix) if out.suffix == ".gguf" else (out.name, "")
    for number in range(1, _MOST_TWINS):
        place = out if number == 1 else out.with_name(f"{stem}-{number}{suffix}")
        try:
            publish_new(made, place)
        except FileExistsError:
            continue
        if place == out:
            return
        taken, kept = (plain(str(path), one_line=True) for path in (out, place))
        raise JobFailed(
            "output_taken",
            f"something appeared at {taken} while {what} was made, and was left as it is. The result lies in {kept}",
            "look at both, and rename or delete one of them",
        )
    shown = plain(str(out), one_line=True)
    raise JobFailed("output_taken", f"{shown} and all names like it are taken", "choose another --out")


def left_by(paths: RunPaths) -> Scratch | None:
    """Return the scratch directory that a killed merge or export has left; None where it left none, or is another job.

    What another run has taken over since belongs to that run.
    """
    try:
        if merge := read_job(paths, MergeRequest):
            scratch = merge_scratch(Path(merge.out))
        elif export := read_job(paths, ExportRequest):
            scratch = export_scratch(Path(export.out))
        else:
            return None
        if not scratch.folders or scratch.held or scratch.owner not in ("", paths.name):
            return None
    except (StudioError, OSError, ValueError):  # ValueError: out is no path that has a name, as in a run edited by hand
        return None
    status = run_status(paths)
    return None if status.live or status is Status.finished else scratch


def give_back(scratch: Scratch) -> None:
    """Delete what a killed job has left, unless another job writes there by now."""
    with suppress(BadInput, OSError), only_writer(scratch, scratch.folder):
        scratch.clear()
