"""What goes on beside a job, in processes of their own: the user's command at its end, and trackers.

Each of them follows the run's log like any reader, so that a command that hangs or a library that fails cannot slow the
job, and outlives the job and the terminal: a run whose process was killed is told of too. What goes wrong in one is
written to `beside/` in the run's folder, and told once.

    python -m studio.runs.beside RUN NAME BEGIN

is started by the job's process; BEGIN is the byte of the log at which the part of this process begins.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.events import Failed, Finished, RunEvent, Sink, Started, Warned
from studio.core.text import plain
from studio.runs.atomic import read_object, write_whole
from studio.runs.home import studio_home
from studio.runs.layout import RunPaths
from studio.runs.log import EventTail
from studio.runs.status import file_bytes, run_status

SETTINGS_FILE = "settings.toml"
"""The file of a person's settings in the home folder, which a person writes."""
TRACKERS = ("trackio", "wandb", "mlflow")
"""Trackers that a recipe may ask for, by the name of their library."""
TENSORBOARD = "tensorboard"
OCCASIONS = ("finish", "failure", "spike")
_PLACEHOLDERS = ("{run}", "{event}", "{words}", "{path}", "{job}")
_TELL = "tell"
_POLL_SECONDS = 1.0
_LOOKS_PER_STATUS = 5
_COMMAND_SECONDS = 30.0
"""How long a user's command may take."""
_HANGS_SECONDS = 120.0
"""A tracker that takes longer over one thing is said to hang."""
_LAST_SECONDS = 300.0
"""How long a tracker may take once the run is over, before its process ends itself."""
_BETWEEN_SPIKES = 600.0
_LONGEST = 400


def begin(paths: RunPaths, *, track: Sequence[str] = (), training: bool = False) -> None:
    """Start what is wanted beside a job; called by its process. Whatever keeps one from starting is told in the run.

    Args:
        paths: The run.
        track: The trackers that its recipe asks for.
        training: Whether it is a training, of which TensorBoard's files are written wherever its package is installed.
    """
    names = []
    try:
        if command_of_settings() is not None:
            names.append(_TELL)
    except BadInput as error:
        _trouble(paths, _TELL, str(error))
    if training and importlib.util.find_spec(TENSORBOARD) is not None:
        names.append(TENSORBOARD)
    for name in track:
        if importlib.util.find_spec(name) is None:
            package = "mlflow-skinny, or mlflow" if name == "mlflow" else name
            _trouble(paths, name, f"train.track: {name} is not installed, and nothing is sent to it. Install {package}")
        else:
            names.append(name)
    for name in names:
        command = [sys.executable, "-m", "studio.runs.beside", str(paths.root.absolute()), name]
        try:
            subprocess.Popen(  # it outlives this process, so nobody here waits for it
                [*command, str(file_bytes(paths.events))],
                stdin=subprocess.DEVNULL,
                start_new_session=sys.platform != "win32",
                close_fds=True,
            )
        except OSError as error:
            _trouble(paths, name, f"{name} cannot be started: {error.strerror}")


def command_of_settings(home: Path | None = None) -> tuple[list[str], tuple[str, ...]] | None:
    """Return the command that tells a person of runs, and at which occasions; None where none is set.

    Raises:
        BadInput: The file of settings cannot be read, or says it in a way that is not understood.
    """
    import tomllib  # noqa: PLC0415  not needed to show a run, as the next one

    path = (home or studio_home()) / SETTINGS_FILE
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tell")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(f"{SETTINGS_FILE} cannot be read: {plain(str(error), one_line=True, limit=200)}") from error
    if table is None:
        return None
    command = table.get("command") if isinstance(table, dict) else None
    on = table.get("on", list(OCCASIONS)) if isinstance(table, dict) else None
    if not isinstance(command, list) or not command or not all(isinstance(word, str) and word for word in command):
        raise BadInput(f'{SETTINGS_FILE}: wanted [tell] command = ["program", "argument", ...], a list of texts')
    if not isinstance(on, list) or not all(word in OCCASIONS for word in on):
        raise BadInput(f"{SETTINGS_FILE}: [tell] on is a list of {', '.join(OCCASIONS)}")
    odd = [word for word in command if "{" in word and word not in _PLACEHOLDERS]
    if odd:
        raise BadInput(
            f"{SETTINGS_FILE}: {plain(odd[0], one_line=True, limit=80)} in [tell] command: a placeholder is a whole "
            f"argument, one of {', '.join(_PLACEHOLDERS)}"
        )
    return command, tuple(on)


def troubles(paths: RunPaths) -> list[str]:
    """Return what went wrong beside a run: a sentence each, harmless."""
    found = [read_object(path).get("trouble") for path in sorted(paths.beside.glob("*.json"))]
    return [plain(words, one_line=True, limit=_LONGEST) for words in found if isinstance(words, str)]


def teller_of_troubles(paths: RunPaths, emit: Callable[..., None]) -> Callable[[], None]:
    """Return what warns in the run's log of what goes wrong beside it, once of each; called every few seconds."""
    told = set[str]()

    def look() -> None:
        for words in troubles(paths):
            if words not in told:
                told.add(words)
                emit(Warned, topic="beside", message=words)

    return look


class Command:
    """Runs the user's command when a run ends, and when its loss leaps up."""

    def __init__(self, paths: RunPaths, command: Sequence[str], on: Sequence[str]) -> None:
        """Wait for the occasions in `on`."""
        self._paths, self._command, self._on = paths, command, on
        self._job, self._words = "", ""
        self._spike_at = -_BETWEEN_SPIKES

    def take(self, event: RunEvent) -> None:
        """Note what the run does; of a spike tell at once, but not every minute."""
        if isinstance(event, Started):
            self._job = event.job
        elif isinstance(event, Failed):
            self._words = event.message
        elif isinstance(event, Finished):
            self._words = f"after {event.step} steps" if event.step else ""
        elif isinstance(event, Warned) and event.topic == "spike" and "spike" in self._on:
            now = time.monotonic()
            if now - self._spike_at >= _BETWEEN_SPIKES:
                self._spike_at = now
                self._run("spike", event.message)

    def close(self, ended: str) -> None:
        """Tell how the run ended."""
        if ("finish" if ended in ("finished", "stopped") else "failure") in self._on:
            self._run(ended, self._words)

    def _run(self, event: str, words: str) -> None:
        said = plain(words, one_line=True, limit=_LONGEST)
        values = {
            "{run}": plain(self._paths.name, one_line=True),
            "{event}": event,
            "{words}": f"{event}: {said}" if said else event,  # never begins with a dash, which would be an option
            "{path}": str(self._paths.root.absolute()),
            "{job}": plain(self._job, one_line=True, limit=40) or "job",
        }
        if why := run_command([values.get(word, word) for word in self._command]):
            _trouble(self._paths, _TELL, f"the command in {SETTINGS_FILE} that tells of runs {why}")


def run_command(command: Sequence[str], limit_seconds: float = _COMMAND_SECONDS) -> str:
    """Run a command of the user's, without a shell; return what went wrong, empty where it ended with 0 in time.

    Args:
        command: The program and its arguments.
        limit_seconds: After it the command is ended, with the processes that it has started.
    """
    import tempfile  # noqa: PLC0415

    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=sys.platform != "win32",
            )
        except (OSError, ValueError) as error:
            return f"cannot be started: {plain(str(error), one_line=True, limit=200)}"
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
            return f"took longer than {limit_seconds:g} s, and was ended"
        if code == 0:
            return ""
        said.seek(0)
        last = said.read(64 * 1024).decode("utf-8", "replace").strip().splitlines()[-1:]
        words = f": {plain(last[0], one_line=True, limit=200)}" if last else ""
        return f"ended with exit code {code}{words}"


def follow(paths: RunPaths, sink: Sink, begin_byte: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Hand a run's events on to a sink until the run has ended, or its process is gone.

    Args:
        paths: The run.
        sink: Gets them.
        begin_byte: Where in the log the part of this process begins.
        sleep: Waits between two looks.
    """
    tail = EventTail(paths.events, begin=begin_byte)
    looks = 0
    while paths.root.is_dir():
        # Before the log is read: what the process tells between the two looks is read then.
        looks += 1
        over = looks % _LOOKS_PER_STATUS == 0 and not run_status(paths).live
        events = tail.poll()
        for event in events:
            sink.take(event)
            if isinstance(event, Finished):
                return sink.close("stopped" if event.outcome == "stopped" else "finished")
            if isinstance(event, Failed):
                return sink.close("failed")
        if over and not events:
            return sink.close("crashed")
        if not events:
            sleep(_POLL_SECONDS)
    return None


class Patience(threading.Thread):
    """Tells of a tracker that takes too long over one thing, and ends its process some time after the run has ended."""

    def __init__(self, paths: RunPaths, name: str, sink: Sink) -> None:
        """Stand before a sink, which is called through this."""
        super().__init__(daemon=True)
        self._paths, self._name, self._sink = paths, name, sink
        self._since: float | None = None
        self._closing = False

    def take(self, event: RunEvent) -> None:
        """Hand an event on."""
        self._since = time.monotonic()
        self._sink.take(event)
        self._since = None

    def close(self, ended: str) -> None:
        """Hand the end on."""
        self._closing, self._since = True, time.monotonic()
        self._sink.close(ended)
        self._since = None

    def run(self) -> None:
        """Look every second."""
        told = False
        while True:
            time.sleep(_POLL_SECONDS)
            took = time.monotonic() - self._since if self._since is not None else 0.0
            if took > _HANGS_SECONDS and not told:
                told = True
                _trouble(self._paths, self._name, f"{self._name} has not answered for {took:.0f} s")
            if took > _LAST_SECONDS and self._closing:
                os._exit(1)


def _trouble(paths: RunPaths, name: str, words: str) -> None:
    """Write down what went wrong; where the disk does not take it, it is lost."""
    with suppress(OSError):
        paths.beside.mkdir(mode=0o700, exist_ok=True)
        write_whole(paths.beside / f"{name}.json", json.dumps({"trouble": words, "at": time.time()}) + "\n")


def _sink_of(paths: RunPaths, name: str) -> Sink:
    if name == _TELL:
        settings = command_of_settings()
        if settings is None:
            raise BadInput(f"{SETTINGS_FILE} names no command any more")
        return Command(paths, *settings)
    from studio.runs.trackers import SINKS  # noqa: PLC0415  only its own process needs them

    return SINKS[name](paths, lambda words: _trouble(paths, name, words))


def main(arguments: Sequence[str]) -> int:
    """Follow a run for one sink; return the exit code."""
    paths, name, begin_byte = RunPaths(Path(arguments[0])), arguments[1], int(arguments[2])
    try:
        sink = Patience(paths, name, _sink_of(paths, name))
        if name != _TELL:
            sink.start()
        follow(paths, sink, begin_byte)
    except Exception as error:  # noqa: BLE001  whatever a library raises is told, and the run goes on
        words = f"{type(error).__name__}: {plain(secretless(str(error)), one_line=True, limit=200)}"
        _trouble(paths, name, f"{name} has failed, and gets nothing more of this run ({words})")
        return 1
    return 0


def secretless(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return a text without the values of environment variables whose names say that they are secret."""
    known: Mapping[str, Any] = os.environ if environment is None else environment
    for name, value in known.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
