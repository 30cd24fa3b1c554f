"""Room on the disk of a run, before it begins."""

import shutil
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.text import plain

_LEAST_FREE_BYTES = 200 * 10**6


def check_space(folder: Path) -> None:
    """Make sure that a run can at least begin on this disk.

    Raises:
        BadInput: Less than 200 MB are free there.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return
    if free < _LEAST_FREE_BYTES:
        shown = plain(str(place), one_line=True)
        raise BadInput(
            f"only {free / 1e6:.0f} MB are free on the disk of {shown}; a run needs at least "
            f"{_LEAST_FREE_BYTES / 1e6:.0f} MB. Free some space or choose another place with --runs-dir."
        )
