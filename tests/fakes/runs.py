"""Runs for tests: a folder like a real one, the fake worker in it, and a log written by hand."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from studio.core.events import RunEvent, event_to_dict
from studio.core.recipe import Recipe
from studio.runs.job import write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.supervise import Handle, launch
from studio.runs.worker import Worker

MODULE = "tests.fakes.job"
CHECKOUT = Path(__file__).resolve().parents[2]


class LiveWorker(Worker):
    """A worker inside the test's own process; what a test finds wrong meanwhile still fails the test."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the run as a worker does, and let every exception on."""
        super().__exit__(kind, error, trace)
        return False


def make_run(root: Path, name: str = "try", recipe: Recipe | None = None, now: float | None = None) -> RunPaths:
    """A prepared run that no process has taken yet."""
    paths = new_run(root / "runs", name, time.time() if now is None else now)
    write_job(paths, recipe or Recipe(name=name))
    return paths


def fake_environment(**settings: Any) -> dict[str, str]:
    """The environment in which `python -m tests.fakes.job` is found and does what the settings say."""
    known = {f"FAKE_{name.upper()}": str(value) for name, value in settings.items()}
    return {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]), **known}


def launch_fake(paths: RunPaths, **settings: Any) -> Handle:
    """Start the fake worker in a run."""
    return launch(paths, MODULE, environment=fake_environment(**settings))


def write_log(paths: RunPaths, *events: RunEvent) -> None:
    """Write a log as a worker would have left it."""
    lines = [json.dumps(event_to_dict(event)) for event in events]
    paths.events.write_text("".join(f"{line}\n" for line in lines))


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Look until something is true; fails the test after the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")
