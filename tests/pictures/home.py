"""A home folder with runs of real processes, for the pictures: made by verbs once, then kept.

On two CPU cores it takes some ten minutes. Nothing in it is invented: the demo's training, one with other settings that
was stopped, one whose process was killed, a merge, an export and an audit of the demo.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.runs.home import HOME_VARIABLE, cache_root
from studio.runs.layout import RunPaths
from studio.runs.watch import read_history

_PATIENCE_SECONDS = 3600.0
_ROLES = "pictured.json"
_SMALL = ("--batch", "4", "--accumulation", "1", "--set", "eval.rows=16", "--set", "eval.samples=1")
"""What keeps the runs that are ended early from taking longer than the one that is not."""


@dataclass(frozen=True, slots=True)
class Home:
    """A folder of runs, with the part that each plays in the pictures."""

    folder: Path

    @property
    def runs(self) -> Path:
        """Where the runs lie."""
        return self.folder / "runs"

    def run(self, role: str) -> RunPaths:
        """Return the run of a role: done, stopped, crashed, merge, export, audit or live."""
        return RunPaths(self.runs / self._roles()[role])

    def has(self, role: str) -> bool:
        """Return whether there is a run of this role."""
        return role in self._roles() and self.run(role).root.is_dir()

    def verb(self, *words: str) -> dict[str, Any]:
        """Do what a verb does, in a process of its own, and return the document that it prints."""
        done = subprocess.run(
            [*self._command(*words), "--json"], check=False, env=self._environment(), capture_output=True, text=True
        )
        if not done.stdout.strip():
            raise RuntimeError(f"{' '.join(words)} printed nothing: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout))

    def prepare(self) -> None:
        """Make the folder. The embedded model is converted once a machine, not once a home."""
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)
        for name in ("models", "tools"):
            if not (self.folder / "cache" / name).exists():
                (cache_root() / name).mkdir(parents=True, exist_ok=True)
                (self.folder / "cache" / name).symlink_to(cache_root() / name, target_is_directory=True)

    def make(self) -> None:
        """Make the runs that are not there yet."""
        self.prepare()
        for role, made in (
            ("done", self._done), ("stopped", self._stopped), ("crashed", self._crashed), ("merge", self._merged),
            ("export", self._exported), ("audit", self._audited),
        ):  # fmt: skip
            if not self.has(role):
                print(f"making the run: {role}", file=sys.stderr, flush=True)
                self._keep(role, made())

    @contextmanager
    def live(self, steps: int = 4) -> Iterator[RunPaths]:
        """Train the demo's recipe until the block ends, from some steps on; then the run is gone."""
        paths = self._begun(steps, "--set", "train.steps=400", "--set", "name=docs-long")
        self._keep("live", paths.name)
        try:
            yield paths
        finally:
            self._end(paths)
            self.verb("runs", "rm", paths.name, "--yes")

    def _done(self) -> str:
        return self._name_of(self.verb("train", "demo"))

    def _stopped(self) -> str:
        paths = self._begun(5, "--method", "lora", "--rank", "8", "--lr", "5e-4", "--set", "name=docs-lora")
        self._end(paths)
        return paths.name

    def _crashed(self) -> str:
        paths = self._begun(2, "--rank", "32", "--set", "name=docs-wide")
        os.kill(json.loads(paths.process.read_text())["pid"], signal.SIGKILL)
        return paths.name

    def _merged(self) -> str:
        return self._name_of(self.verb("merge", self.run("done").name, "--out", str(self.folder / "merged")))

    def _exported(self) -> str:
        words = ("export", str(self.folder / "merged"), "--format", "q8_0", "--out", str(self.folder / "gguf"))
        return self._name_of(self.verb(*words))

    def _audited(self) -> str:
        return self._name_of(self.verb("audit", "run", self.run("done").name, "--rows", "24"))

    def _name_of(self, document: dict[str, Any]) -> str:
        return str(document["run"])

    def _begun(self, steps: int, *words: str) -> RunPaths:
        """Return a training that has taken some steps and goes on."""
        paths = RunPaths(self.runs / self._name_of(self.verb("train", "demo", "--detach", *_SMALL, *words)))
        _wait(lambda: read_history(paths).last_step >= steps, f"step {steps} of {paths.name}")
        return paths

    def _end(self, paths: RunPaths) -> None:
        self.verb("runs", "stop", paths.name, "--wait", "120")

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "studio", *words]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, HOME_VARIABLE: str(self.folder)}

    def _roles(self) -> dict[str, str]:
        kept = self.folder / _ROLES
        return dict(json.loads(kept.read_text())) if kept.is_file() else {}

    def _keep(self, role: str, name: str) -> None:
        (self.folder / _ROLES).write_text(json.dumps({**self._roles(), role: name}, indent=1))


def _wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.2)
