"""What a worker's process prints, followed from a kept offset. Foreign text: every line comes back harmless."""

import os
from pathlib import Path

from studio.core.text import plain
from widgets.log_view import visible_lines

_FIRST_BYTES = 64 * 1024
_MOST_BYTES = 256 * 1024
_MOST_LINES = 2000
_LONGEST_LINE = 4000


class OutputTail:
    """Follows `output.log`. The first look takes the end only; a line counts once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset: int | None = None
        self._torn = b""

    def poll(self) -> list[str]:
        """Return the whole lines that came since the last call; of a flood only the newest 2000, 256 KiB at most."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                begin = self._begin(size)
                file.seek(begin)
                chunk = file.read(size - begin)
        except OSError:
            return []
        skipped = begin != self._offset
        self._offset = begin + len(chunk)
        if skipped:
            self._torn = b""
            chunk = chunk.partition(b"\n")[2] if begin else chunk
        whole, newline, self._torn = (self._torn + chunk).rpartition(b"\n")
        if not newline:
            return []
        newest = whole.rsplit(b"\n", _MOST_LINES)[-_MOST_LINES:]
        return harmless(b"\n".join(newest).decode("utf-8", "replace"))

    def _begin(self, size: int) -> int:
        """A log that shrank is another log: read it from its start."""
        if self._offset is None or size < self._offset:
            return max(0, size - _FIRST_BYTES)
        return max(self._offset, size - _MOST_BYTES)


def harmless(text: str) -> list[str]:
    """Return the lines of foreign text as a terminal may show them: no control, no reordering, no endless line."""
    return [plain(line, one_line=True, limit=_LONGEST_LINE) for line in visible_lines(text)]
