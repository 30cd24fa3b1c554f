"""Resumes a training by itself after a crash: `python -m studio.launch.guard RUN TIMES [MODULE]`.

`--restarts` starts this process beside the worker; it outlives the terminal as the worker does. What ended a run must
be an accident of the machine: a signal, the system's out-of-memory killer, a card that is lost. An error in recipe or
data would come again. So would the same failure at the same step, which ends it too; so do a stop and a pause.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from studio.core.errors import StudioError
from studio.core.events import Failed, Started, StepDone
from studio.core.text import duration_text, plain
from studio.launch.start import resume
from studio.runs.control import requested
from studio.runs.last_words import kind_of_crash
from studio.runs.layout import RunPaths
from studio.runs.lock import lock_held
from studio.runs.log_parts import log_tail
from studio.runs.native import CARD_LOST
from studio.runs.process import mark_of
from studio.runs.restarts import RESTARTED, write_guard
from studio.runs.status import Status, run_status

_POLL_SECONDS = 1.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 600.0
ACCIDENTS = CARD_LOST - {"device_assert"} | {"gpu_busy", "gpu_driver", "gpu_error", "gpu_communication"}
"""Failures that a job could still tell of and that are no fault of its recipe or data."""


class Guard:
    """Watches one run.

    Attributes:
        used: How often it has restarted the run.
    """

    def __init__(
        self,
        paths: RunPaths,
        times: int,
        module: str | None = None,
        *,
        first_pause: float = _FIRST_PAUSE_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to watch.

        Args:
            paths: The run.
            times: How often it may be restarted.
            module: The job's module; None takes that of its kind.
            first_pause: Seconds before the first restart; each pause is twice as long as the one before.
            sleep: Waits between two looks.
            clock: Seconds, for the pauses.
        """
        self._paths, self._times, self._module = paths, times, module
        self._pause, self._sleep, self._clock = first_pause, sleep, clock
        self._mark: Any = mark_of(os.getpid())
        self.used = 0

    def watch(self) -> str:
        """Restart the run as often as it may be and is worth it; return why that ended."""
        self._tell("")
        last: tuple[str, int] | None = None
        while True:
            while self._at_work():
                self._sleep(_POLL_SECONDS)
            status = run_status(self._paths, guarded=False)
            if status in (Status.finished, Status.stopped) or not self._paths.root.is_dir():
                return self._over("")
            kind, step = self._ended(status)
            if status is Status.failed and kind not in ACCIDENTS:
                return self._over(f"{kind} is no accident: it would come again")
            if (kind, step) == last:
                return self._over(f"{kind} came again at step {step}")
            if (why := self._wait(kind, step)) is None:
                continue
            if why:
                return self._over(why)
            last = kind, step

    def _wait(self, kind: str, step: int) -> str | None:
        """Pause, then restart; return why it gives up, empty where the run works again, None where it did meanwhile."""
        because = f"{kind} after step {step}"
        while self.used < self._times:
            pause = min(_LONGEST_PAUSE_SECONDS, self._pause * 2**self.used)
            self._tell(f"{because}: it is restarted in {duration_text(pause)} ({self.used + 1} of {self._times})")
            end = self._clock() + pause
            while self._clock() < end:
                if requested(self._paths, "stop") or requested(self._paths, "pause"):
                    return "it was asked to stop"
                if self._at_work():
                    return None
                self._sleep(min(_POLL_SECONDS, pause))
            self.used += 1
            told = json.dumps({"number": self.used, "of": self._times, "because": because})
            try:
                # Through the queue: another run may have taken the card.
                resume(self._paths, module=self._module, queue=True, environment={RESTARTED: told})
            except (StudioError, OSError) as error:  # the card is not back yet, or never will be
                because = f"{kind} after step {step}; a restart failed: {plain(str(error), one_line=True, limit=200)}"
                continue
            self._tell("")
            return ""
        return f"{because}: restarted {self.used} times, as often as it may be"

    def _at_work(self) -> bool:
        # The lock, too: until a new worker has said that it starts, the log ends as the last one left it.
        return lock_held(self._paths.lock) or run_status(self._paths, guarded=False).live

    def _ended(self, status: Status) -> tuple[str, int]:
        """Return the kind of failure and the step after which it came."""
        tail = log_tail(self._paths.events)
        step, started, failed = tail.last(StepDone), tail.last(Started), tail.last(Failed)
        at = max(step.step if step else 0, started.resumed_from if started else 0)
        if status is Status.failed and failed is not None:
            return failed.failure, at
        return kind_of_crash(self._paths), at

    def _tell(self, words: str) -> None:
        with suppress(OSError):  # a full disk: the run goes on without the words
            write_guard(self._paths, self._mark, used=self.used, times=self._times, words=words)

    def _over(self, words: str) -> str:
        with suppress(OSError):
            write_guard(self._paths, self._mark, used=self.used, times=self._times, words=words, over=True)
        return words


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m studio.launch.guard RUN TIMES [MODULE]")
    Guard(RunPaths(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else None).watch()
