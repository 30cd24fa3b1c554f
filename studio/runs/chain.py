"""Which run follows another: an export that a merge named, started by the merge's own process at its end."""

from pathlib import Path

from studio.runs.layout import RunPaths

_LONGEST_NAME = 255


def next_run(paths: RunPaths) -> RunPaths | None:
    """Return the run that was started when this one had ended; None where there is none (yet)."""
    try:
        name = paths.next.read_text("utf-8")[:_LONGEST_NAME].strip()
    except (OSError, ValueError):
        return None
    run = RunPaths(paths.root.parent / Path(name).name)
    return run if name and run.exists else None
