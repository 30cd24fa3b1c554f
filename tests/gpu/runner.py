"""Runs checks one after another, each in a process of its own, and sees to it that each leaves all as it was.

Whatever becomes of a check, the next one begins: a check may fail, hang (its time limit ends it), crash in native code,
call `exit(1)` without an exception, or be killed by the system for its memory. After every check these must be as
before it: the environment (this process's, and the check's own as far as it lived to tell), the files under the watched
folders, and the processes: what a check started and left is named, ended, and makes it a failed one.

Knows nothing of torch or of cards, and needs nothing but psutil beside the standard library.
"""

import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.gpu import processes

TOKEN = "LORA_STUDIO_GPU_CHECK"
"""A variable whose value is the session's own: a process that has it in its environment was started by a check."""

OK, FAILED, SKIP, NOT_RUN = "ok", "FAILED", "SKIP", "not run"
_ENDING_SECONDS = 10.0
_LAST_LINES = 12
_LEFT_OUT = frozenset(
    {".git", ".venv", "__pycache__", "build", "dist", ".hypothesis", ".import_linter_cache"}
    | {f".{tool}_cache" for tool in ("mypy", "ruff", "pytest")}
)
"""Folders that are not watched: what tools keep for themselves."""
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to find out.

    Attributes:
        name: What is to hold, in words; unique.
        part: The part of the whole that it belongs to.
        function: Where it is, as `module:function`.
        arguments: What the function gets beside the bench.
        limit_seconds: After this it counts as hanging and is ended.
        inherited: Whether it sees all cards that the mask of this process leaves, not only the chosen one.
    """

    name: str
    part: str
    function: str
    arguments: tuple[str, ...] = ()
    limit_seconds: float = 120.0
    inherited: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a check.

    Attributes:
        name: Of the check.
        part: Of the check.
        outcome: ok, FAILED, SKIP, or not run.
        seconds: How long its process lived.
        said: What was seen, or why it failed or was skipped.
        lines: More of what was seen.
        figures: Numbers by name.
        changed: What it did not leave as it was.
        output: The last lines that a failed one printed.
    """

    name: str
    part: str
    outcome: str
    seconds: float = 0.0
    said: str = ""
    lines: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    output: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Result":
        """Return the result that a report's values are."""
        lists = {name: tuple(values.get(name, ())) for name in ("lines", "changed", "output")}
        return cls(**{**values, **lists})

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a check must leave as it is, seen from outside of it."""

    variables: dict[str, str]
    directory: str
    files: dict[str, tuple[int, int]]

    @classmethod
    def look(cls, watched: Iterable[Path]) -> "Surroundings":
        """Return how it is now."""
        files = {str(path): seen for root in watched for path, seen in _files(root)}
        return cls(dict(os.environ), str(Path.cwd()), files)

    def changes_to(self, after: "Surroundings") -> list[str]:
        """Return in words what is no longer so."""
        names = sorted(
            name for name in self.variables.keys() | after.variables.keys() if _differ(self, after, "variables", name)
        )
        found = [f"variable {name} of the runner" for name in names]
        found += [f"working directory {after.directory}"] if after.directory != self.directory else []
        paths = sorted(path for path in self.files.keys() | after.files.keys() if _differ(self, after, "files", path))
        for path in paths[:_MOST_NAMED]:
            word = "new" if path not in self.files else "deleted" if path not in after.files else "changed"
            found.append(f"file {path} {word}")
        more = len(paths) - _MOST_NAMED
        return [*found, f"and {more} more files"] if more > 0 else found


@dataclass(slots=True)
class Runner:
    """Runs checks.

    Attributes:
        device: `cuda` or `cpu`.
        session: A folder of this run of checks; the caller deletes it.
        environment: The environment of every check.
        chosen: What is added to it so that a check sees the chosen card alone.
        watched: Folders whose files no check may touch.
        server: The socket of the server that forks the processes; empty where each has its own interpreter.
        leaving_seconds: How long what a check started may take to end by itself once the check has ended.
        clock: Seconds.
    """

    device: str
    session: Path
    environment: Mapping[str, str]
    chosen: dict[str, str] = field(default_factory=dict)
    watched: Sequence[Path] = ()
    server: str = ""
    leaving_seconds: float = 10.0
    clock: Callable[[], float] = time.monotonic
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def shared(self) -> Path:
        """The folder of what all checks share."""
        return self.session / "shared"

    def run(self, check: Check) -> Result:
        """Run one check and return what became of it."""
        self.shared.mkdir(parents=True, exist_ok=True)
        folder = self.session / "check"
        before = Surroundings.look(self.watched)
        began = self.clock()
        try:
            answer, code, left = self._process(check, folder)
            output = _last_lines(folder / "output.log")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = self.clock() - began
        changed = [*answer.get("changed", ()), *left, *before.changes_to(Surroundings.look(self.watched))]
        outcome, said = _judged(check, answer, code, output)
        if changed and outcome != FAILED:
            outcome, said = FAILED, f"did not leave all as it was; it said: {said}"
        return Result(
            name=check.name,
            part=check.part,
            outcome=outcome,
            seconds=round(seconds, 2),
            said=said,
            lines=tuple(answer.get("lines", ())),
            figures=answer.get("figures", {}),
            changed=tuple(changed),
            output=output if outcome == FAILED else (),
        )

    def _process(self, check: Check, folder: Path) -> tuple[dict[str, Any], int | None, list[str]]:
        """Return the answer of a check's process, empty where it left none; its exit code; and what it left running."""
        work = folder / "work"
        for place in (work, folder / "tmp"):
            place.mkdir(parents=True)
        asked, answered = folder / "asked.json", folder / "answer.json"
        words = {"function": check.function, "arguments": check.arguments, "device": self.device, "server": self.server}
        asked.write_text(json.dumps({**words, "folder": str(work), "shared": str(self.shared)}), "utf-8")
        process = processes.start(
            "tests.gpu.child",
            [str(asked), str(answered)],
            server=self.server,
            environment={
                **self.environment,
                **({} if check.inherited else self.chosen),
                TOKEN: self.token,
                "TMPDIR": str(folder / "tmp"),
            },
            output=folder / "output.log",
            folder=work,
        )
        group = process.pid
        try:
            code = process.wait(check.limit_seconds)
        except BaseException:
            processes.kill_group(group)
            self._end_leftovers(group)
            raise
        if code is None:
            processes.kill_group(group)
            process.wait(_ENDING_SECONDS)
            self._end_leftovers(group)
            return {}, None, []
        left = self._end_leftovers(group, patience=self.leaving_seconds)
        answer = json.loads(answered.read_text("utf-8")) if answered.is_file() else {}
        return answer, code, left

    def _end_leftovers(self, group: int, patience: float = 0.0) -> list[str]:
        """End what a check left running, after a moment in which it may end by itself; return it in words."""
        end = self.clock() + patience
        while (left := list(_started_by(self.token, group))) and self.clock() < end:
            time.sleep(0.05)
        words = [f"process {process.pid} {_name_of(process)} left running" for process in left]
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_ENDING_SECONDS)
        return words


def run_all(
    runner: Runner,
    checks: Sequence[Check],
    tell: Callable[[Result], None],
    *,
    seconds: float = 0.0,
) -> list[Result]:
    """Run checks in their order and return what became of each; every result is told as soon as it is there.

    Args:
        runner: What runs them.
        checks: All of them.
        tell: Gets each result.
        seconds: Time for all; a check whose limit no longer fits is not begun. 0 sets no limit.
    """
    began = runner.clock()
    results = []
    for check in checks:
        rest = seconds - (runner.clock() - began)
        if seconds and check.limit_seconds > rest:
            why = f"its limit of {check.limit_seconds:.0f} s does not fit the {max(0.0, rest):.0f} s that are left"
            result = Result(check.name, check.part, NOT_RUN, said=why)
        else:
            result = runner.run(check)
        results.append(result)
        tell(result)
    return results


def _judged(check: Check, answer: Mapping[str, Any], code: int | None, output: Sequence[str]) -> tuple[str, str]:
    last = f": {output[-1]}" if output else ""
    if code is None:
        return FAILED, f"hung: ended after its limit of {check.limit_seconds:.0f} s{last}"
    if code == 0 and answer:
        return str(answer["outcome"]), str(answer["said"])
    after = f" after it had said: {answer['said']}" if answer else ""
    if code < 0:
        name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
        reason = "; the system does that when its memory is full" if name == "SIGKILL" else ""
        return FAILED, f"its process was ended by {name}{reason}{after}{last}"
    return FAILED, f"its process ended with exit code {code} and no exception{after}{last}"


def _files(root: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in _LEFT_OUT:
                        yield from _files(Path(entry.path))
                else:
                    stat = entry.stat(follow_symlinks=False)
                    yield Path(entry.path), (stat.st_size, stat.st_mtime_ns)


def _differ(one: Surroundings, other: Surroundings, table: str, name: str) -> bool:
    return bool(getattr(one, table).get(name) != getattr(other, table).get(name))


def _started_by(token: str, group: int) -> Iterator[psutil.Process]:
    """Yield the living processes that have a check's variable, or are of its group: forked ones show no variables."""
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getpgid(process.pid) == group or process.environ().get(TOKEN) == token:
                yield process


def _name_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:4])
    return "?"


def _last_lines(path: Path) -> tuple[str, ...]:
    with suppress(OSError):
        lines = path.read_bytes()[-16_384:].decode("utf-8", "replace").splitlines()
        return tuple(line for line in lines if line.strip())[-_LAST_LINES:]
    return ()


if __name__ == "__main__":
    sys.exit("this is no program: run python -m tests.gpu")
