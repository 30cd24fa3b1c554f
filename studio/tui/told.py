"""How much of some data a thread has read, for the screen that waits for it."""

import time
from collections.abc import Callable


class Abandoned(Exception):
    """The data that are read are no longer those under the cursor."""


class ReadingTold:
    """Shows how much of some data was read, once that takes longer than a second, and ends what nobody waits for."""

    def __init__(
        self,
        show: Callable[[str], object],
        is_over: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            show: Shows words.
            is_over: Whether nobody waits any more.
            clock: Seconds.
        """
        self._show, self._is_over, self._clock = show, is_over, clock
        self._next = clock() + 1.0

    def __call__(self, done: int, total: int) -> None:
        """Tell how much is done.

        Raises:
            Abandoned: Nobody waits any more.
        """
        if self._is_over():
            raise Abandoned
        if (now := self._clock()) >= self._next:
            self._next = now + 0.5
            self._show(f"Reading the data: {100 * done / max(1, total):.0f} %")
