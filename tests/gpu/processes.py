"""Starts a module as a process of its own: from the beginning on a card, from a warm fork in a rehearsal.

On a card every process is `python -m MODULE`, as the program starts its jobs: a process that has touched CUDA cannot be
forked. On a CPU importing torch and its friends is nearly all that a short check costs (6 s of 6.5), so a rehearsal
forks from a server that has imported them and done nothing else. Both are real processes: one may crash, hang or be
killed, and nothing of it stays.

`python -m tests.gpu.processes SOCKET MODULE ...` is that server: it ends when its stdin does. multiprocessing's own
fork server would not do: what was forked from it cannot use it (Python 3.11 begins another), and checks start jobs.
"""

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

_MOST_WAITING = 64
_LOST = 255


class Process(Protocol):
    """A started process."""

    pid: int

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""


class Cold:
    """A process that began with an interpreter of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.pid = process.pid

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class Warm:
    """A process that the server forked; it tells how that ended."""

    def __init__(self, server: str, job: Mapping[str, Any]) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(server)
        self._line.sendall(json.dumps(job).encode() + b"\n")
        self._code: int | None = None
        self.pid = int(self._read() or _LOST)

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._line.settimeout(max(0.001, seconds))
            with suppress(TimeoutError):
                self._code = int(self._read() or _LOST)
                self._line.close()
        return self._code

    def _read(self) -> bytes:
        """Return the next line; empty where the server has ended."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self._line.recv(1)
            if not byte:
                return b""
            line += byte
        return line


def start(
    module: str,
    arguments: Sequence[str],
    *,
    server: str,
    environment: Mapping[str, str],
    output: Path,
    folder: Path,
    group: int = 0,
) -> Process:
    """Start `python -m MODULE ARGUMENTS`, its output in a file.

    Args:
        module: What runs.
        arguments: Its words.
        server: The socket of a server that forks it; empty for an interpreter of its own.
        environment: All of its environment.
        output: Gets stdout and stderr.
        folder: Its working directory.
        group: The process group that it joins; 0 for one of its own.
    """
    if server:
        return Warm(
            server,
            {
                "module": module,
                "arguments": list(arguments),
                "environment": dict(environment),
                "output": str(output),
                "folder": str(folder),
                "group": group,
            },
        )
    with output.open("ab") as sink:
        return Cold(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=dict(environment),
                cwd=folder,
                process_group=group,
            )
        )


class Server:
    """The warm server; as a context, it ends with it."""

    def __init__(self, address: Path, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        """Begin it; returns when it has imported the modules.

        Raises:
            RuntimeError: It ended instead.
        """
        self.address = str(address)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.processes", self.address, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
        )
        if not self._process.stdout or not self._process.stdout.readline():
            raise RuntimeError(f"the server of warm processes ended with exit code {self._process.wait()}")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def kill_group(group: int) -> None:
    """End all processes of a group at once."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def serve(address: str, modules: Sequence[str]) -> None:
    """Fork what is asked for until stdin ends."""
    for module in modules:
        import_module(module)
    told, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(wake)
    lines: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(_MOST_WAITING)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([0, listener, told], [], [])
            if 0 in ready:
                return
            if told in ready:
                os.read(told, _MOST_WAITING)
                _tell_ends(lines)
            if listener in ready:
                line = listener.accept()[0]
                with line.makefile("rb") as asked:
                    job = json.loads(asked.readline())
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for number in (signal.SIGCHLD, signal.SIGINT):
                        signal.signal(number, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for other in (listener, line, *lines.values()):
                        other.close()
                    os.close(told)
                    os.close(wake)
                    become(**job)
                with suppress(OSError):
                    os.setpgid(pid, job["group"] or pid)
                with suppress(OSError):
                    line.sendall(b"%d\n" % pid)
                lines[pid] = line


def _tell_ends(lines: dict[int, socket.socket]) -> None:
    while lines:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with lines.pop(pid) as line, suppress(OSError):  # who asked may have ended
            line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def become(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], output: str, folder: str, group: int
) -> None:
    """Be `python -m MODULE ARGUMENTS` from here on, and end the process with it."""
    code = 1
    try:
        os.setpgid(0, group)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, source in ((0, null), (1, sink), (2, sink)):
            os.dup2(source, number)
        sys.argv = [module, *arguments]
        sys.modules.pop(module, None)  # a program runs anew, whoever has imported it
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
