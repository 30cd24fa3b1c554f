"""All runs of a folder: listed from the two ends of their logs, found by name, and removed while no worker lives."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.events import Evaluated, Failed, Finished, Planned, Saved, Started, StepDone, Warned
from studio.core.text import plain
from studio.runs.last_words import kind_of_crash
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.log_parts import LogEnd, log_head, log_tail
from studio.runs.note import read_note
from studio.runs.scratch import give_back, left_by
from studio.runs.status import Status, run_status
from studio.runs.summary import folder_bytes

LAST = "last"


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One line of the list of runs. None is what the two ends of the log do not hold.

    Attributes:
        first_eval_loss: The held-out loss before the first step.
        rank: The adapter's rank.
        made: The path that the run saved something at last, as its log tells it.
        warnings: What it warned of, as far as the two ends of the log hold it.
    """

    paths: RunPaths
    status: Status
    name: str
    job: str | None
    method: str | None
    model: str | None
    last_step: int | None
    total: int | None
    last_loss: float | None
    eval_loss: float | None
    started_at: float | None
    last_at: float | None
    note: str = ""
    failure: str | None = None
    first_eval_loss: float | None = None
    rank: int | None = None
    made: str | None = None
    warnings: tuple[str, ...] = ()


def list_runs(root: Path) -> list[RunInfo]:
    """Return the runs in a folder, newest first; folders that are no run are passed over."""
    infos = [run_info(paths) for paths in runs_in(root)]
    return sorted(infos, key=lambda info: (_made_at(info), info.name), reverse=True)


def run_info(paths: RunPaths) -> RunInfo:
    """Return what a list shows of one run, from the two ends of its log."""
    head, tail = log_head(paths.events), log_tail(paths.events)
    first = head.first(Started)
    start, planned = tail.last(Started) or first, tail.last(Planned) or head.last(Planned)
    status = run_status(paths, tail=tail)
    step, evaluated, end = tail.last(StepDone), tail.last(Evaluated), tail.last(Finished)
    began = first or start
    before, saved = head.first(Evaluated), tail.last(Saved)
    # The two ends of a short log are the same lines.
    warned = dict.fromkeys((event.at, event.message) for event in [*head.all(Warned), *tail.all(Warned)])
    return RunInfo(
        paths=paths,
        status=status,
        name=paths.name,
        job=start.job if start else None,
        method=start.method if start else None,
        model=start.model if start else None,
        last_step=step.step if step else end.step if end else None,
        total=planned.total_steps if planned else start.total_steps if start else None,
        last_loss=step.loss if step else None,
        eval_loss=evaluated.loss if evaluated else None,
        started_at=began.at if began else None,
        last_at=tail.last_at,
        note=read_note(paths),
        failure=_failure(paths, status, tail),
        first_eval_loss=before.loss if before and not before.step else None,
        rank=_rank(first),
        made=saved.path if saved else None,
        warnings=tuple(message for _, message in warned),
    )


def _rank(started: Started | None) -> int | None:
    adapter = started.recipe.get("adapter") if started else None
    rank = adapter.get("rank") if isinstance(adapter, dict) else None
    return rank if isinstance(rank, int) else None


def _failure(paths: RunPaths, status: Status, tail: LogEnd) -> str | None:
    """Return the kind of failure that a run ended with; None where it has not failed, or its log does not say."""
    if status is Status.failed and (failed := tail.last(Failed)):
        return failed.failure
    return kind_of_crash(paths) if status is Status.crashed else None


def find_run(root: Path, word: str) -> RunPaths:
    """Return the run that a word means: its path, its name, the beginning of one name only, or `last`.

    Raises:
        BadInput: No run or several runs answer to the word.
    """
    shown = plain(word, one_line=True)
    if word == LAST:
        infos = list_runs(root)
        if not infos:
            raise BadInput(f"there are no runs in {plain(str(root), one_line=True)} yet.")
        return infos[0].paths
    runs = runs_in(root)
    exact = [paths for paths in runs if paths.name == word]
    if exact:
        return exact[0]
    # Names come before paths, so that a folder of the same name here does not hide a run; no run's name has a slash.
    if ("/" in word or "\\" in word or word in (".", "..")) and "\0" not in word:
        paths = RunPaths(Path(word).expanduser().absolute())
        if paths.exists:
            return paths
        raise BadInput(f"{shown} is no run folder: it holds neither recipe.toml nor events.jsonl.")
    begun = [paths for paths in runs if word and paths.name.startswith(word)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        names = ", ".join(sorted(plain(paths.name, one_line=True) for paths in begun)[:5])
        raise BadInput(f"{len(begun)} runs begin with {shown!r} ({names}{' ...' if len(begun) > 5 else ''}): say more.")
    raise BadInput(f"there is no run {shown!r} in {plain(str(root), one_line=True)}; see: lora-studio runs list")


@dataclass(frozen=True, slots=True)
class LeftOver:
    """What a killed merge or export left beside its output.

    Attributes:
        run: The run that left it; resuming the run goes on with it, removing the run deletes it.
        folders: The hidden folders.
        size_bytes: Size of all files in them.
    """

    run: RunPaths
    folders: tuple[Path, ...]
    size_bytes: int

    @property
    def words(self) -> str:
        """How much is left, where, and by which run, for a message."""
        first, *more = (plain(str(folder), one_line=True) for folder in self.folders)
        others = f" and {len(more)} more hidden beside it" if more else ""
        return f"{self.size_bytes / 1e9:.2f} GB in {first}{others}, of {plain(self.run.name, one_line=True)}"

    @property
    def advice(self) -> str:
        """What to do with it."""
        name = plain(self.run.name, one_line=True)
        return f"go on with lora-studio runs resume {name}, or delete all of it with lora-studio runs rm {name}"


def left_over(root: Path) -> list[LeftOver]:
    """Return what killed runs have left. Where several wrote to one place, the newest one is named."""
    found = {scratch: paths for paths in sorted(runs_in(root), key=_folder_time) if (scratch := left_by(paths))}
    return [
        LeftOver(paths, tuple(scratch.folders), sum(map(folder_bytes, scratch.folders)))
        for scratch, paths in found.items()
    ]


def contents_of(paths: RunPaths) -> str:
    """Return what is deleted with a run, in words and with its size."""
    checkpoints = len(list(paths.checkpoints.glob("step-*"))) if paths.checkpoints.is_dir() else 0
    parts = [
        "its log",
        f"{checkpoints} checkpoint{'s' if checkpoints > 1 else ''}" if checkpoints else "",
        "its adapter" if paths.adapter.is_dir() else "",
        "its report" if paths.report.is_file() else "",
    ]
    size_bytes = folder_bytes(paths.root)
    if scratch := left_by(paths):
        parts.append("what lies half-made beside its output")
        size_bytes += sum(map(folder_bytes, scratch.folders))
    *most, last = [part for part in parts if part]
    listed = f"{', '.join(most)} and {last}" if most else last
    return f"{listed}, {size_bytes / 1e6:,.1f} MB"


def remove_run(paths: RunPaths) -> None:
    """Delete a run's folder with its checkpoints and adapter, and what it left beside its output if it was killed.

    Raises:
        BadInput: The run is live, the folder is no run, or it cannot be deleted.
    """
    name = plain(paths.name, one_line=True)
    # A folder of the user's own may hold a recipe.toml too. A run has at least one of these: control/ is made with it.
    ours = any(place.exists() for place in (paths.control, paths.events, paths.launch, paths.process))
    if not paths.exists or not ours or paths.root.is_symlink():
        raise BadInput(f"{name} is no run folder; nothing was removed.")
    if run_status(paths).live or lock_held(paths.lock):
        raise BadInput(f"the run {name} is live: stop it first (lora-studio runs stop {name}).")
    # Renamed first, so that a kill half-way leaves a hidden folder and no run that is half there.
    doomed = paths.root.with_name(f".{paths.name}.removed")
    if scratch := left_by(paths):
        give_back(scratch)
    try:
        paths.root.replace(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise BadInput(f"the run {name} cannot be removed: {error.strerror}.") from error


def runs_in(root: Path) -> list[RunPaths]:
    """Return the runs in a folder, in no order; folders that are no run are passed over."""
    try:
        folders = [entry for entry in root.iterdir() if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return []
    return [paths for folder in folders if (paths := RunPaths(folder)).exists]


def _made_at(info: RunInfo) -> float:
    return info.started_at or _folder_time(info.paths)


def _folder_time(paths: RunPaths) -> float:
    try:
        return paths.root.stat().st_mtime
    except OSError:
        return 0.0
