"""Workers in a moment: a process that has the jobs' libraries, of which each worker is a fork.

A fork is a process like any other: with its own session, locks, memory limit and death. Only its imports are spared,
twelve seconds each time. `Warm().popen` goes to `studio.runs.supervise.launch` in the place of `subprocess.Popen`.

A worker can be told to stop itself (SIGSTOP) at a moment, so that a fault from outside meets it there:
`FAULT_HOLD=phase:NAME` (it has told that phase), `step:N` (it has told that step), `file:N` (before its Nth change of a
file below the run's folder or `FAULT_BELOW`), or `file:N:PATTERN` (before the Nth such change whose path matches);
several with `;` between them.
"""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree")


class Warm:
    """The client: starts the process, and asks it for workers."""

    def __init__(self) -> None:
        # Large blocks go back to the system when they are freed: a limit set later then meets the next one.
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            env=environment,
        )

    def ask(self, **order: Any) -> Any:
        """Send an order and return the answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def popen(self, command: list[str], *, stdout: int, cwd: Path, env: Mapping[str, str], **_: Any) -> "WarmProcess":
        """Start `python -m MODULE RUN` as a fork."""
        module, run = command[-2:]
        output = str(Path(f"/proc/self/fd/{stdout}").readlink())
        pid = self.ask(module=module, run=run, output=output, cwd=str(cwd), env=dict(env))
        return WarmProcess(self, pid)

    def end(self) -> None:
        """End the process; its workers live on."""
        self._server.kill()
        self._server.wait()


class WarmProcess:
    """What `subprocess.Popen` would be, of a fork."""

    def __init__(self, warm: Warm, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._warm = warm

    def poll(self) -> int | None:
        """Return how it ended; None while it lives."""
        if self.returncode is None:
            self.returncode = self._warm.ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120.0) -> int:
        """Wait for its end and return its exit code."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, while it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)

    @property
    def held(self) -> bool:
        """Whether it has stopped itself, or was stopped."""
        return stopped(self.pid)


def stopped(pid: int) -> bool:
    """Return whether a process is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _serve() -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import studio.jobs.export.job
    import studio.jobs.merge.job
    import studio.jobs.train.job  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "ended" in order:
            pid, status = os.waitpid(order["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _work(order)
        print(json.dumps(answer), flush=True)


def _work(order: Mapping[str, Any]) -> None:
    """Become the worker, and end with its exit code."""
    code = 1
    try:
        os.setsid()
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for place, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
            os.dup2(descriptor, place)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        sys.argv = [order["module"], order["run"]]
        _prepare(order["run"])
        runpy.run_module(order["module"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare(run: str) -> None:
    """Do in a worker's process what its `FAULT_*` say."""
    for moment in os.environ.get("FAULT_HOLD", "").split(";"):
        hold_at(moment, os.environ.get("FAULT_BELOW", run))
    if "FAULT_ALONE_BYTES" in os.environ:
        from studio.jobs.base.data import encode_pool

        encode_pool.ALONE_BYTES = int(os.environ["FAULT_ALONE_BYTES"])


def cold(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a worker as a process of its own, with the same `FAULT_*`; for what must be there from its first moment."""
    return subprocess.Popen([sys.executable, "-m", "tests.faults.warm", *command[-2:]], **options)


def hold_at(moment: str, below: str) -> None:
    """Let this process stop itself at a moment, once."""
    kind, _, rest = moment.partition(":")
    if kind == "file":
        _hold_at_file(*rest.partition(":")[::2], below)
    elif kind:
        _hold_at_event(kind, rest)


def _hold() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_at_event(kind: str, wanted: str) -> None:
    from studio.runs.worker import Worker

    emit, done = Worker.emit, list[str]()

    def telling(self: Worker, event: type, **fields: Any) -> None:
        emit(self, event, **fields)
        name = fields.get("name") if kind == "phase" else fields.get("step") if event.__name__ == "StepDone" else None
        if not done and str(name) == wanted:
            done.append(wanted)
            _hold()

    Worker.emit = telling  # type: ignore[method-assign]


def _hold_at_file(number: str, pattern: str, below: str) -> None:
    left = [int(number)]

    def watching(event: str, arguments: tuple[Any, ...]) -> None:
        if left[0] <= 0 or event not in _CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
        if any(path.startswith(below) and re.search(pattern, path[len(below) :]) for path in paths):
            left[0] -= 1
            if not left[0]:
                _hold()

    sys.addaudithook(watching)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        _serve()
    _prepare(sys.argv[2])
    module, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    runpy.run_module(module, run_name="__main__")
