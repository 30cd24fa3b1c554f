"""Runs that a job has started for it: by a process of `studio.launch`, which checks and starts as for a person.

So a job need not import the checks of other jobs, or what starts them. The process lives for a second or two; the run
that it starts outlives it, and may outlive the job that asked.
"""

import json
import subprocess
import sys
from pathlib import Path

from studio.core.errors import BadInput, StudioError
from studio.runs.chain import following
from studio.runs.job import Job, job_text
from studio.runs.layout import RunPaths
from studio.runs.supervise import child_environment

_LAUNCH = "studio.launch"
_BAD_INPUT = 2


def start_run(job: Job, runs_root: Path, *, module: str = "") -> RunPaths:
    """Have a job checked, its run made and its worker launched; return once the worker holds the run.

    Args:
        job: What to do.
        runs_root: Where runs live.
        module: The job's module; empty means that of its kind.

    Raises:
        BadInput: The job cannot be done as asked; no folder was made.
        StudioError: The worker cannot be started; no folder is left.
    """
    return RunPaths(Path(_ask("start", runs_root, module, job_text(job))))


def resume_run(paths: RunPaths, *, module: str = "") -> None:
    """Have a worker started in the folder of a run that was stopped, failed or crashed.

    Args:
        paths: The run.
        module: The job's module; empty means that of its kind.

    Raises:
        BadInput: The run cannot go on.
        StudioError: The worker cannot be started.
    """
    _ask("resume", paths.root, module)


def start_next(paths: RunPaths, *, module: str = "") -> None:
    """Have the run started that a merge or an export names to follow it; called by its process when it is over.

    Why it could not be started is printed on stderr, which is the run's `output.log`.

    Args:
        paths: The run that has ended.
        module: The following job's module; empty means that of its kind.
    """
    try:
        if following(paths) is not None:
            _ask("next", paths.root, module)
    except (StudioError, OSError) as error:
        sys.stderr.write(f"the export that should follow could not be started: {error}\n")


def _ask(what: str, folder: Path, module: str, job: str = "") -> str:
    """Return the folder of the run that a process of `studio.launch` has started."""
    command = [sys.executable, "-m", _LAUNCH, what, str(folder.absolute()), *([module] if module else [])]
    done = subprocess.run(command, input=job.encode(), stdout=subprocess.PIPE, env=child_environment({}), check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise StudioError(f"the process that starts runs ended early, with exit code {done.returncode}") from None
    if "run" in answer:
        return str(answer["run"])
    raise (BadInput if done.returncode == _BAD_INPUT else StudioError)(str(answer["error"]))
