"""Starts runs on behalf of a job: `python -m studio.launch start|resume|next FOLDER [MODULE]`.

Jobs may not import this room, so `studio.runs.launched` calls it as a process. `start` reads the new job from stdin, as
TOML. The answer is JSON on stdout: `{"run": FOLDER}`, or `{"error": WHY}` with the exit code 2 for bad input and 1 for
everything else.
"""

import json
import sys
import tomllib
from pathlib import Path

from studio.core.errors import BadInput, StudioError
from studio.launch.kinds import kind_named
from studio.launch.start import resume, start, start_next
from studio.runs.job import job_from_table, kind_in
from studio.runs.layout import RunPaths


def _started(what: str, folder: Path, module: str | None) -> Path | None:
    if what == "start":
        table = tomllib.loads(sys.stdin.buffer.read().decode())
        job = job_from_table(table, kind_named(kind_in(table)).request, "what was asked for")
        return start(job, folder, module=module).root
    if what == "resume":
        return resume(RunPaths(folder), module=module).paths.root
    following = start_next(RunPaths(folder), module=module)
    return following.root if following else None


def _answer(what: str, folder: Path, module: str | None) -> int:
    try:
        run = _started(what, folder, module)
    except (StudioError, OSError) as error:
        sys.stdout.write(json.dumps({"error": str(error)}))
        return 2 if isinstance(error, BadInput) else 1
    sys.stdout.write(json.dumps({"run": str(run) if run else None}))
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("start", "resume", "next"):
        sys.exit("usage: python -m studio.launch start|resume|next FOLDER [MODULE]")
    sys.exit(_answer(sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else None))
