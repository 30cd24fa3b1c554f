"""A run's checkpoints as they lie on the disk: which are whole, which are damaged and why, and where a resume begins.

A checkpoint is `checkpoints/step-00000120/`. It counts only if it has its marker `complete.json`, which is written last
and lists every file's size and SHA-256. Only `studio.jobs.train.checkpoint` knows what the files hold.
"""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.runs.control import asked_step, requested
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.watch import read_history

MARKER = "complete.json"
ADAPTER_TENSORS, INITIAL_TENSORS = "adapter.safetensors", "initial.safetensors"
"""The adapter's tensors, and those that its base was changed by at the start (PiSSA): what a merge reads of it."""
_STEP, _ASIDE, _LATER = "step-", "damaged-", "later-"
_KEPT, _BEST = "kept", "best"
_MOST_MARKER_BYTES = 2**20
_NAMED = 4


class NoWholeCheckpoint(BadInput):
    """No checkpoint is whole of a run that had some: a resume would start over at step 0, so the user is asked first.

    Attributes:
        found: What is wrong with them, without what to do.
    """

    def __init__(self, name: str, found: str) -> None:
        super().__init__(
            f"{found}. Restore one from a copy, or let the run start over at step 0, with what is damaged kept beside "
            f"it: lora-studio runs resume {name} --from-start"
        )
        self.found = found


@dataclass(frozen=True, slots=True)
class Damaged:
    """A checkpoint from which a run cannot be resumed, and why not."""

    folder: Path
    why: str

    @property
    def words(self) -> str:
        """Its step and what is wrong, for a message."""
        return f"step {step_of(self.folder)} ({self.why})"


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest whole one; None starts at step 0.
        damaged: The damaged ones that are newer than it, the newest first; they are passed over.
        done: The last step in the log.
        saved: Steps of the checkpoints that were saved, by the log.
        later: Those after the one that was asked for by its step, which are passed over too.
    """

    checkpoint: Path | None
    damaged: tuple[Damaged, ...]
    done: int
    saved: tuple[int, ...]
    later: tuple[Path, ...] = ()

    @property
    def step(self) -> int:
        """The optimizer step that it goes on after."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def starts_over(self) -> bool:
        """Whether training begins at step 0 again although steps were done."""
        return self.checkpoint is None and bool(self.done or self.damaged or self.saved)

    @property
    def note(self) -> str:
        """What to say before it goes on; empty where nothing is out of order."""
        if self.later:
            names = ", ".join(str(step_of(folder)) for folder in self.later)
            return f"going back to step {self.step}, as was asked for; kept beside it: checkpoints of step {names}"
        if self.checkpoint and self.damaged:
            return f"damaged and passed over: checkpoint {_listed(self.damaged)}; going on after step {self.step}"
        if not self.starts_over:
            return ""
        if self.damaged:
            return f"every checkpoint is damaged: {_listed(self.damaged)}; starting over at step 0, as was asked for"
        if self.saved:
            return "no checkpoint is left; starting over at step 0, as was asked for"
        return f"no checkpoint was saved before the run ended after step {self.done}; starting over at step 0"


def resumption(paths: RunPaths, history: History, *, from_start: bool, step: int | None = None) -> Resumption:
    """Return where a training run goes on: after its newest whole checkpoint, or at step 0 where it never had one.

    Args:
        paths: The run.
        history: Its events so far.
        from_start: Whether the user agreed that it starts over.
        step: The step of the checkpoint after which the user wants it to go on; None for the newest whole one.

    Raises:
        NoWholeCheckpoint: It had checkpoints, none is whole, and the user has not agreed to start over.
        BadInput: The user agreed to start over though there is a whole one, or the checkpoint that was asked for is not
            there or is damaged.
    """
    if step is not None:
        return _named(paths, history, step)
    newer: list[Damaged] = []
    whole = None
    for folder in reversed(checkpoint_folders(paths.checkpoints)):
        if not (why := damage_of(folder)):
            whole = folder
            break
        newer.append(Damaged(folder, why))
    saved = tuple(event.step or 0 for event in history.saved if event.what == "checkpoint")
    found = Resumption(whole, tuple(newer), history.last_step, saved)
    name = plain(paths.name, one_line=True)
    if whole is not None and from_start:
        raise BadInput(
            f"the run {name} has a whole checkpoint after step {found.step}: resume it without --from-start. To train "
            "from the first step, start a new run from its recipe.toml."
        )
    if whole is None and (newer or saved) and not from_start:
        lost = f"the run {name} saved a checkpoint after step {saved[-1]}, and none is left" if saved else ""
        raise NoWholeCheckpoint(
            name, f"every checkpoint of the run {name} is damaged: {_listed(newer)}" if newer else lost
        )
    return found


def asked_resumption(paths: RunPaths) -> Resumption:
    """Return where a training run goes on, as the requests in its folder say.

    Raises:
        BadInput: As `resumption`.
    """
    over = requested(paths, "from-start")
    return resumption(paths, read_history(paths), from_start=over, step=asked_step(paths))


def _named(paths: RunPaths, history: History, step: int) -> Resumption:
    """Return that a run goes on after the checkpoint of this step.

    Raises:
        BadInput: It is not there, or damaged.
    """
    folders = checkpoint_folders(paths.checkpoints)
    chosen = next((folder for folder in folders if step_of(folder) == step), None)
    why = "there is none" if chosen is None else damage_of(chosen)
    if chosen is None or why:
        there = ", ".join(str(step_of(folder)) for folder in folders if folder != chosen) or "none"
        name = plain(paths.name, one_line=True)
        raise BadInput(f"the run {name} cannot go on after the checkpoint of step {step}: {why}. Others: {there}.")
    saved = tuple(event.step or 0 for event in history.saved if event.what == "checkpoint")
    later = tuple(folder for folder in folders if step_of(folder) > step)
    return Resumption(chosen, (), history.last_step, saved, later)


def healthy_before(paths: RunPaths, step: int) -> Path | None:
    """Return the newest checkpoint from before the losses of a run went wrong, whole by its marker; None without one.

    Args:
        paths: The run.
        step: The first step whose loss was wrong. It was computed with the weights that the step before had left, which
            may be what is wrong: a checkpoint of that step is not trusted.
    """
    return next((path for path in reversed(complete_checkpoints(paths.checkpoints)) if step_of(path) < step - 1), None)


def keep_back(checkpoint: Path) -> None:
    """Let a checkpoint stay when older ones are deleted, in place of one that was kept back before.

    Raises:
        OSError: The folder cannot be written.
    """
    for other in complete_checkpoints(checkpoint.parent):
        (other / _KEPT).unlink(missing_ok=True)
    (checkpoint / _KEPT).touch(mode=0o600)


def keep_best(checkpoint: Path, held_out_loss: float) -> None:
    """Let a checkpoint stay as the best one, if none that is there has a lower held-out loss, or one as low.

    Raises:
        OSError: The folder cannot be written.
    """
    losses = {path: loss for path in complete_checkpoints(checkpoint.parent) if (loss := _best_loss(path)) is not None}
    losses.pop(checkpoint, None)
    if not math.isfinite(held_out_loss) or any(loss <= held_out_loss for loss in losses.values()):
        return
    (checkpoint / _BEST).write_text(repr(held_out_loss), encoding="ascii")
    for other in losses:
        (other / _BEST).unlink(missing_ok=True)


def _best_loss(checkpoint: Path) -> float | None:
    try:
        return float((checkpoint / _BEST).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def checkpoints_kept(folder: Path) -> list[dict[str, Any]]:
    """Return the step of each checkpoint that has a marker, and whether it is kept as the best; ready for JSON."""
    return [{"step": step_of(path), "best": _best_loss(path) is not None} for path in complete_checkpoints(folder)]


def outdated(folder: Path, keep: int) -> list[Path]:
    """Return the checkpoints to delete: all but the newest, so many as `keep`, the best, and what was kept back.

    With them goes what is older and has no marker: its removal was killed half-way.
    """
    kept = complete_checkpoints(folder)[-keep:]
    older = [path for path in checkpoint_folders(folder) if kept and step_of(path) < step_of(kept[0])]
    return [path for path in older if not ((path / _KEPT).exists() or (path / _BEST).exists())]


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders that are named as checkpoints, whole or not, the oldest step first."""
    found = [path for path in folder.glob(f"{_STEP}*") if path.name.removeprefix(_STEP).isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that have a marker, the oldest step first; their files are not verified."""
    return [path for path in checkpoint_folders(folder) if (path / MARKER).is_file()]


def step_of(path: Path) -> int:
    """Return the optimizer step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix(_STEP))


def damage_of(folder: Path, only: Collection[str] = ()) -> str:
    """Return what is wrong with a checkpoint, in a few words that are safe to print; empty where it is whole.

    Args:
        folder: The checkpoint.
        only: The files to verify; empty for all. Files that the checkpoint never had are passed over.
    """
    try:
        if (folder / MARKER).stat().st_size > _MOST_MARKER_BYTES:
            return f"its {MARKER} is damaged"
        files = json.loads((folder / MARKER).read_bytes())["files"]
        # A name with a folder in it would make the check read files outside of the checkpoint.
        listed = {name: files[name] for name in files if not only or name in only}
        if not listed or any(Path(name).name != name for name in listed):
            return f"its {MARKER} is damaged"
    except FileNotFoundError:
        return f"it has no {MARKER}"
    except OSError as error:
        return f"{MARKER} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"its {MARKER} is damaged"
    return next((why for name, seen in listed.items() if (why := _damage_of_file(folder / name, seen))), "")


def file_stamp(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as the marker lists them."""
    import hashlib  # noqa: PLC0415  brings OpenSSL, 5 MiB that the studio's screens need not hold

    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def set_aside(going_on: Resumption) -> None:
    """Rename checkpoints that are passed over so that new ones can have their names; none is deleted.

    Raises:
        OSError: The folder cannot be written.
    """
    passed = [(_ASIDE, one.folder) for one in going_on.damaged] + [(_LATER, folder) for folder in going_on.later]
    for begins, folder in passed:
        place = folder.with_name(f"{begins}{folder.name}")
        twin = 1
        while place.exists():
            twin += 1
            place = folder.with_name(f"{begins}{folder.name}-{twin}")
        folder.rename(place)


def _damage_of_file(path: Path, seen: object) -> str:
    name = plain(path.name, one_line=True, limit=80)
    try:
        # The size is compared first: it is known at once, where the checksum reads the whole file.
        if isinstance(seen, dict) and path.stat().st_size != seen.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {plain(str(seen.get('bytes')), limit=20)}"
        return "" if file_stamp(path) == seen else f"{name} is not what was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _listed(damaged: Collection[Damaged]) -> str:
    words = [one.words for one in damaged]
    return ", ".join(words[:_NAMED]) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")
