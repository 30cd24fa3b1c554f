"""Room on the disk of a run, before it begins."""

import shutil
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain

_LEAST_FREE_BYTES = 200 * 10**6


def check_space(folder: Path, needed_bytes: int = _LEAST_FREE_BYTES, option: str = "--runs-dir") -> None:
    """Make sure that a run can at least begin on this disk.

    Args:
        folder: On the disk; need not exist yet.
        needed_bytes: At least 200 MB are wanted in any case.
        option: Of the command line, that chooses another place.

    Raises:
        BadInput: Less is free there.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
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
