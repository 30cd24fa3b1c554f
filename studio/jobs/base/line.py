"""A piped process's own end of its pipes (`studio.runs.piped`): events out, requests in, a JSON object a line each."""

import json
import os
import queue
import sys
import threading
from typing import Any, TextIO

from studio.runs.piped import event_line


class Line:
    """Both ends of the pipe to the program. What libraries print goes to stderr, where it cannot mix with events.

    Attributes:
        asked: The requests in their order, but no `cancel`.
        cancelled: Set by a `cancel`, cleared by the next request.
    """

    def __init__(self) -> None:
        """Begin to listen."""
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.asked: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, event: Any) -> None:
        """Write an event; ends the process where the program at the other end is gone."""
        try:
            self._out.write(event_line(event) + "\n")
            self._out.flush()
        except OSError:
            os._exit(0)

    def _listen(self) -> None:
        for line in sys.stdin:
            table = json.loads(line)
            if table.get("cancel"):
                self.cancelled.set()
            else:
                # Cleared here, in the order of the lines: a question may be cancelled before its answer begins.
                self.cancelled.clear()
                self.asked.put(table)
        # The program at the other end is gone. There is nothing to save, and loading cannot be interrupted in any other
        # way.
        os._exit(0)
