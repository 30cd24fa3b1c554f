"""How often the system ended processes because memory was full, so that it can be said of a run that was killed.

The kernel counts its out-of-memory kills for each control group (a container, a batch job, a user's session) and for
the whole machine. A worker writes the count down when it begins, and any process that looks at the run later compares.
Kills by ordinary programs that guard the memory (earlyoom, systemd-oomd) are counted nowhere.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEMORY_KILLS = "memory_kills"
"""The field of `process.json` that holds the counts."""

ALMOST_FULL = "main memory"
"""Topic of a training's warning that hardly any main memory is left."""

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MACHINE = Path("/proc/vmstat")


def kill_counts() -> dict[str, int]:
    """Return the count that concerns this process, by the file that holds it; empty where the system keeps none.

    It is that of the control group, where there is one: the machine's count includes kills in other containers.
    """
    for file in (*_group_files(), _MACHINE):
        count = _count_in(file)
        if count is not None:
            return {str(file): count}
    return {}


def kills_since(before: Mapping[str, Any]) -> int | None:
    """Return how many processes were ended for memory since `kill_counts`; None where it can no longer be told."""
    for file, count in before.items():
        now = _count_in(Path(file)) if file.startswith(("/sys/fs/cgroup/", "/proc/vmstat")) else None
        if now is not None and isinstance(count, int) and now >= count:
            return now - count
    return None


def _group_files() -> list[Path]:
    """Return the files with the counts of this process's control groups, its own group before those around it."""
    found: list[Path] = []
    try:
        lines = _MEMBERSHIP.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return found
    for line in lines:
        _, controllers, name = line.split(":", 2)
        group = Path(name.lstrip("/"))
        if "memory" in controllers.split(","):
            found += [_GROUPS / "memory" / part / "memory.oom_control" for part in (group, *group.parents)]
        elif not controllers:
            found += [_GROUPS / part / "memory.events" for part in (group, *group.parents)]
    return found


def _count_in(file: Path) -> int | None:
    try:
        words = dict(line.split(maxsplit=1) for line in file.read_text("ascii").splitlines() if " " in line)
        return int(words["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None
