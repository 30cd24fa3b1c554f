"""A kind of job that is not shipped, whole: what it is asked, what is checked, what it does.

With its row in the table of job kinds this file is all that there is of it: `tests/launch/test_toy_kind.py`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from studio.core.errors import BadInput
from studio.core.events import Finished, Phase, Started
from studio.launch.kinds import Checked, JobKind
from studio.probe.data.opened import Progress
from studio.runs.job import read_job
from studio.runs.job_process import run_job
from studio.runs.worker import Worker


@dataclass(frozen=True, slots=True)
class CountRequest:
    """Words to be counted in a text.

    Attributes:
        text: Path of the file.
        words: Which ones.
        least: How often a word must be there to be told.
        share: Whether the shares of all words are told too.
    """

    kind: ClassVar[str] = "count"
    text: str
    words: tuple[str, ...]
    least: int = 1
    share: bool = False


def check(request: CountRequest, progress: Progress) -> Checked[CountRequest]:
    """Check that there is a text.

    Raises:
        BadInput: There is none.
    """
    text = Path(request.text).absolute()
    if not text.is_file():
        raise BadInput(f"there is no text {text.name}.")
    return Checked(replace(request, text=str(text)), notes=("counting is quick",))


COUNT = JobKind(CountRequest, "tests.fakes.toy_job", lambda request: f"count-{Path(request.text).stem}", check)


def main(worker: Worker) -> None:
    """Count."""
    request = read_job(worker.paths, CountRequest)
    assert request is not None
    worker.emit(Started, job="count", model=None)
    worker.emit(Phase, name="counting", fraction=0.5)
    found = Path(request.text).read_text().split()
    counts = {word: found.count(word) for word in request.words if found.count(word) >= request.least}
    shares = {word: count / len(found) for word, count in counts.items()} if request.share else {}
    worker.emit(Finished, outcome="done", result={"counts": counts, "shares": shares})


if __name__ == "__main__":
    sys.exit(run_job(Path(sys.argv[1]), main))
