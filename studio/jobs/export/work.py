"""What every format's export needs at hand: the run that it tells, a folder for what lies about, the user's word."""

from dataclasses import dataclass
from pathlib import Path

from studio.core.events import Warned
from studio.core.text import plain
from studio.jobs.base.llama.gguf_tools import ensure_tools
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.progress import PhaseTeller, heed
from studio.runs.scratch import Scratch
from studio.runs.worker import Worker


@dataclass(frozen=True, slots=True)
class Work:
    """An export at work.

    Attributes:
        worker: Of the export's run.
        scratch: Where it writes; gone at the end.
        say: Tells what is being done.
    """

    worker: Worker
    scratch: Scratch
    say: PhaseTeller

    @property
    def folder(self) -> Path:
        """For what lies about meanwhile."""
        return self.scratch.folder

    def warn(self, message: str) -> None:
        """Tell something that the user should know."""
        self.worker.emit(Warned, topic="export", message=plain(message, one_line=True, limit=400))

    def heed(self) -> None:
        """Do nothing, unless the user asked for an early end.

        Raises:
            Cancelled: So it is.
        """
        heed(self.worker, "stopped before the export was published")

    def llama(self) -> LlamaTool:
        """Return llama.cpp's tools, fetched first where that has not been done.

        Raises:
            BadInput: A folder was named that does not hold them.
            JobFailed: They could not be fetched.
        """
        return LlamaTool(ensure_tools(self.say, self.heed), self.worker.paths.tool_log, self.heed)
