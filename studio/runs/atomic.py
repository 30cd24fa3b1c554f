"""Files and folders that appear whole or not at all, whatever is killed in between.

The order (write aside, fsync, rename, fsync the folder) is what makes a rename durable on POSIX file systems.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

_OWNER_ONLY = 0o600
_REPLACED = ".{name}.replaced"


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; readable by the owner only.

    Raises:
        OSError: The disk or the folder refuses; the old file is untouched and nothing is left beside it.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(aside: Path, final: Path) -> None:
    """Give a finished folder its final name; what it held under that name before is replaced.

    Everything in the folder is flushed to disk before the rename. A kill between taking the old folder away and
    naming the new one leaves the old one under a hidden name, from which `mend_folder` brings it back.

    Raises:
        OSError: A file cannot be flushed or the rename is refused (`aside` on another file system, no permission).
    """
    for folder, _, names in os.walk(aside):
        for name in names:
            _sync(Path(folder, name))
        sync_folder(Path(folder))
    replaced = final.with_name(_REPLACED.format(name=final.name))
    if final.exists():
        _remove(replaced)
        final.replace(replaced)
    aside.replace(final)
    sync_folder(final.parent)
    _remove(replaced)


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
