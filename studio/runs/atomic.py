"""Files and folders that appear whole or not at all, whatever is killed in between; and what reads their JSON.

The order (write a scratch file, fsync, rename, fsync the folder) is what makes a rename durable on POSIX file systems.
"""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

_OWNER_ONLY = 0o600
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)
_REPLACED = ".{name}.replaced"
_MOST_BYTES = 50 * 2**20


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; readable by the owner only.

    Raises:
        OSError: The disk or the folder refuses; the old file is untouched and nothing is left beside it.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    # A random name in the same folder: two writers do not meet, and the rename stays within one file system.
    scratch = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_object(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file; empty where the file is missing, too large, damaged or holds something else."""
    try:
        found = {} if path.stat().st_size > most_bytes else json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def publish_folder(scratch: Path, final: Path) -> None:
    """Give a finished folder its final name in a place that is the program's own; what had that name is replaced.

    Everything in the folder is flushed to disk before the rename. A kill between taking the old folder away and
    naming the new one leaves the old one under a hidden name, from which `mend_folder` brings it back.

    Raises:
        OSError: A file cannot be flushed or the rename is refused (`scratch` on another file system, no permission).
    """
    _sync_all(scratch)
    replaced = final.with_name(_REPLACED.format(name=final.name))
    if final.exists():
        # Unlike a file, a folder cannot be renamed onto a folder that holds something: the old one goes away first.
        _remove(replaced)
        final.replace(replaced)
    scratch.replace(final)
    sync_folder(final.parent)
    _remove(replaced)


def publish_new(scratch: Path, final: Path) -> None:
    """Give a finished folder or file its final name in a place of the user's, where nothing is ever replaced.

    Only an empty folder may give way. No look before the rename decides whether the name is free: the rename itself
    fails where something has just taken it.

    Raises:
        FileExistsError: Something lies there; both are left as they are.
        OSError: As for `publish_folder`.
    """
    if scratch.is_dir():
        _sync_all(scratch)
        if final.is_dir() and not final.is_symlink():
            with suppress(OSError):
                final.rmdir()  # only an empty one can be; Windows renames onto no folder at all
        try:
            scratch.rename(final)  # onto a folder that holds something, a file or a link, a folder cannot be renamed
        except OSError as error:
            if error.errno in _TAKEN or os.path.lexists(final):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
            raise
    else:
        _sync(scratch)
        _rename_new_file(scratch, final)
    sync_folder(final.parent)


def _rename_new_file(scratch: Path, final: Path) -> None:
    """Rename a file without replacing another: a hard link fails where the name is taken, a rename would replace.

    On a file system without hard links a look before the rename has to do.
    """
    try:
        final.hardlink_to(scratch)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from None
        scratch.rename(final)
    else:
        scratch.unlink()


def mend_folder(final: Path) -> None:
    """Undo a `publish_folder` that was killed half-way: bring the old folder back where the new one never came."""
    replaced = final.with_name(_REPLACED.format(name=final.name))
    if replaced.is_dir() and not final.exists():
        replaced.replace(final)
    _remove(replaced)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable, where the platform lets one open a folder at all (Windows does not)."""
    with suppress(OSError):
        _sync(folder)


def _sync_all(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder, name))
        sync_folder(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
