"""Whether a run or an output can be kept in a place: room on its disk, permission, a path that the libraries take.

Checked before a run begins, since at the end of a training it would be too late.
"""

import os
import shutil
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain

_LEAST_FREE_BYTES = 200 * 10**6
_LONGEST_INSIDE_BYTES = 320
"""Length of the longest path below a folder of runs, or beside an output.

It is that of a run's name (68), an export's merge in it, a checkpoint that is being written, a file in it (names in
models are under 100), and what is added to a name while it is incomplete.
"""
_MOST_PATH_BYTES = 4096
_MOST_NAME_BYTES = 255 - len(".merging-.merged-for-.lock")


def check_space(folder: Path, needed_bytes: int = _LEAST_FREE_BYTES, option: str = "--runs-dir") -> None:
    """Make sure that a run can at least begin on this disk.

    Args:
        folder: A folder on the disk, which need not exist yet.
        needed_bytes: What the run needs; 200 MB are wanted in any case.
        option: The flag that chooses another place, for messages.

    Raises:
        BadInput: Less is free there, nothing can be written there, or not all libraries can write to such a path.
    """
    place = check_place(folder, option)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return
    needed = max(needed_bytes, _LEAST_FREE_BYTES)
    if free < needed:
        shown = plain(str(place), one_line=True)
        raise BadInput(
            f"only {free / 1e6:.0f} MB are free on the disk of {shown}; a run needs at least "
            f"{needed / 1e6:.0f} MB. Free some space or choose another place with {option}."
        )


def check_memory(needed_bytes: float, what: str, advice: str, free_bytes: float | None = None) -> None:
    """Make sure that something has room in memory.

    Args:
        needed_bytes: What it takes; an estimate.
        what: What takes it, such as `the model needs about`.
        advice: What to do where there is no room, without a capital letter.
        free_bytes: What is free; None asks the system.

    Raises:
        BadInput: Less is free.
    """
    if free_bytes is None:
        import psutil  # noqa: PLC0415  most verbs that check nothing so need not load it

        free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        numbers = f"{needed_bytes / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free"
        raise BadInput(f"{what} {numbers}: {advice}")


def check_place(folder: Path, option: str = "--runs-dir") -> Path:
    """Make sure that files can be kept in a folder, or in the first one above it that exists; return that one.

    safetensors and tokenizers take only paths in UTF-8, and a path has a longest length: both would end a training at
    its last step, when the adapter is saved.

    Args:
        folder: The folder, which need not exist yet.
        option: The flag that chooses another place, for messages.

    Raises:
        BadInput: The path is not UTF-8 or too long, or it is no folder, or cannot be written.
    """
    place = folder.absolute()
    shown = plain(str(place), one_line=True, limit=300)
    other = f"Choose another place with {option}{' or LORA_STUDIO_HOME' if option == '--runs-dir' else ''}."
    if any("\udc80" <= character <= "\udcff" for character in str(place)):
        raise BadInput(
            f"the path {shown} is not UTF-8, and the libraries that write weights and tokenizers take no other: rename "
            f"the folder. {other}"
        )
    most = _most_path_bytes() - 1 - _LONGEST_INSIDE_BYTES
    length = len(os.fsencode(place))
    if length > most:
        raise BadInput(
            f"the path {shown} is too long: it has {length} bytes, and {most} leave room for the files in it. {other}"
        )
    while not _exists(place) and place != place.parent:
        place = place.parent
    said = plain(str(place), one_line=True, limit=300)
    if not place.is_dir():
        raise BadInput(f"{said} is no folder, so nothing can be kept in {shown}. {other}")
    if not os.access(place, os.W_OK | os.X_OK):
        why = "its disk is read-only" if _read_only(place) else "permission denied"
        raise BadInput(f"nothing can be written in {said}: {why}. {other}")
    return place


def check_name(path: Path) -> None:
    """Make sure that an output's name leaves room for the hidden names that it has while it is made.

    Raises:
        BadInput: It does not, or it is not UTF-8.
    """
    shown = plain(path.name, one_line=True, limit=300)
    if any("\udc80" <= character <= "\udcff" for character in path.name):
        raise BadInput(f"the name {shown} is not UTF-8, and the libraries take no other: choose another --out.")
    length = len(os.fsencode(path.name))
    if length > _MOST_NAME_BYTES:
        raise BadInput(
            f"the name {shown} is too long: it has {length} bytes; wanted at most {_MOST_NAME_BYTES}, since it gets a "
            f"longer one while it is made. Choose another --out."
        )


def check_out(out: Path) -> None:
    """Check that a model can be written to a place, and that nothing lies there yet.

    Raises:
        BadInput: It cannot, or something does.
    """
    check_name(out)
    shown = plain(str(out), one_line=True)
    try:
        if out.is_symlink():  # a finished folder cannot be renamed over it
            raise BadInput(f"the output {shown} is a symbolic link: name the place that it points to.")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"the output {shown} already exists and is not empty: choose another --out or remove it.")
    except OSError as error:
        raise BadInput(f"the output {shown} cannot be used: {error.strerror}.") from error
    try:
        check_place(out.absolute().parent, "--out")
    except BadInput as error:
        raise BadInput(f"the output {shown} cannot be made: {error}") from error


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a part of its path has too long a name
        return False


def _most_path_bytes() -> int:
    try:
        return os.pathconf("/", "PC_PATH_MAX")
    except (AttributeError, OSError, ValueError):  # Windows has none
        return _MOST_PATH_BYTES


def _read_only(place: Path) -> bool:
    try:
        return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    except (AttributeError, OSError):
        return False
