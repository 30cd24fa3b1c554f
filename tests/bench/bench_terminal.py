"""The studio in a real pseudo-terminal: how soon it shows, how soon it answers, how much it writes, how much it holds.

Run: `python -m tests.bench.bench_terminal [PART ...]`, on a quiet machine. Prints a line per figure, with targets.
"""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles

import psutil

from studio.core.events import Finished, Planned, Started, StepDone, event_to_dict
from studio.runs.layout import RunPaths
from studio.runs.supervise import stop
from tests.fakes.runs import launch_fake, make_run

COLUMNS, ROWS = 120, 40
GAUGE = b"GiB"
RIGHT, LEFT = b"\x1b[C", b"\x1b[D"
BRAILLE = [bytes([0xE2, second]) for second in range(0xA0, 0xA4)]


class Terminal:
    """A program in a terminal of its own; everything that it writes is timed and counted."""

    def __init__(self, words: Sequence[str], home: Path, columns: int = COLUMNS, rows: int = ROWS) -> None:
        self.began = time.perf_counter()
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.environ.update(LORA_STUDIO_HOME=str(home), TERM="xterm-256color", COLORTERM="truecolor")
            os.environ.pop("SSH_CONNECTION", None)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execv(  # noqa: S606  no shell is wanted
                sys.executable, [sys.executable, *words]
            )
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float) -> bytes:
        """Return what is written within a time."""
        written, end = b"", time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self._master], [], [], left)[0]:
                written += self._take()
        return written

    def until(self, *marks: bytes, seconds: float = 30.0) -> float:
        """Wait for one of some bytes and return the moment; the terminal's own clock is `time.perf_counter`."""
        written, end = b"", time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            if select.select([self._master], [], [], left)[0]:
                written += self._take()
                if any(mark in written for mark in marks):
                    return time.perf_counter()
        raise TimeoutError(f"none of {marks} within {seconds} s; the last of {len(written)} bytes: {written[-300:]!r}")

    def press(self, keys: bytes) -> float:
        """Press keys and return the moment."""
        os.write(self._master, keys)
        return time.perf_counter()

    def resident_mib(self) -> float:
        """Memory that the process holds."""
        return psutil.Process(self.pid).memory_info().rss / 2**20

    def close(self) -> None:
        """End the program."""
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        os.close(self._master)

    def _take(self) -> bytes:
        try:
            return os.read(self._master, 65536)
        except OSError:
            return b""


@contextmanager
def terminal(*words: str, home: Path) -> Iterator[Terminal]:
    """A program until the block ends."""
    opened = Terminal(words, home)
    try:
        yield opened
    finally:
        opened.close()


STUDIO = ("-m", "studio", "--recipe", "demo")


def first_frame(home: Path, times: int = 9) -> list[float]:
    """Milliseconds from the start of the process to its first words on the screen, warm."""
    found = []
    for _ in range(times + 1):
        with terminal(*STUDIO, home=home) as studio:
            found.append(1000 * (studio.until(b"Rank") - studio.began))
    return found[1:]


def key_to_gauge(home: Path, words: Sequence[str], presses: int = 120) -> list[float]:
    """Milliseconds from a key on a slider to the gauge's first new bytes."""
    with terminal(*words, home=home) as studio:
        studio.until(GAUGE)
        studio.read(3.0)
        found = []
        for turn in range(presses):
            pressed = studio.press(RIGHT if turn % 2 == 0 else LEFT)
            found.append(1000 * (studio.until(GAUGE, seconds=5) - pressed))
            studio.read(0.08 + 0.013 * (turn % 11))  # every phase of the plots' half second is met
    return found


def while_running(home: Path, seconds: float = 15.0) -> tuple[float, float]:
    """Bytes a second that a live run costs the line, and resident MiB at its end."""
    paths = make_run(home, "live")
    launch_fake(paths, steps=100000, seconds=0.1)
    try:
        with terminal("-m", "studio", home=home) as studio:
            studio.until(*BRAILLE)
            studio.read(4.0)
            written = len(studio.read(seconds))
            return written / seconds, studio.resident_mib()
    finally:
        stop(paths, grace_seconds=5)


def while_idle(home: Path, seconds: float = 10.0) -> dict[str, int]:
    """Bytes that each screen writes while nothing happens; one studio each, all at the same time."""
    with ExitStack() as stack:
        studios = {name: stack.enter_context(terminal(*STUDIO, home=home)) for name in ("configure", "runs", "run")}
        for name, studio in studios.items():
            studio.until(GAUGE)
            for key in {"runs": (b"o",), "run": (b"o", b"\r")}.get(name, ()):
                studio.press(key)
                studio.read(1.5)
        for studio in studios.values():
            studio.read(1.5)
        time.sleep(seconds)
        return {name: len(studio.read(0.01)) for name, studio in studios.items()}


def long_run(home: Path, events: int = 100_000) -> RunPaths:
    """A finished run with many steps."""
    paths = make_run(home, "long")
    planned = Planned(
        at=1.0, total_steps=events, trainable_parameters=1, rows=1, held_out_rows=1, device="cpu", dtype="fp32",
        loss_path="chunked",
    )  # fmt: skip
    lines = [json.dumps(event_to_dict(event)) for event in (Started(at=1.0, job="train", method="qlora"), planned)]
    for step in range(1, events + 1):
        event = StepDone(
            at=1.0 + step,
            step=step,
            loss=1 + 100 / (step + 50),
            learning_rate=2e-4,
            grad_norm=0.5,
            tokens=999,
            seconds=1.0,
        )
        lines.append(json.dumps(event_to_dict(event)))
    lines.append(json.dumps(event_to_dict(Finished(at=2e5, outcome="done", step=events))))
    paths.events.write_text("\n".join(lines) + "\n")
    return paths


def open_long_run(home: Path, times: int = 5) -> tuple[list[float], list[float]]:
    """Milliseconds from the key that opens it to the first curve, and to a key's answer while the rest is read."""
    curves, answers = [], []
    for _ in range(times):
        with terminal(*STUDIO, home=home) as studio:
            studio.until(GAUGE)
            studio.press(b"o")
            studio.until(b"long-")
            studio.read(1.0)
            pressed = studio.press(b"\r")
            curves.append(1000 * (studio.until(*BRAILLE) - pressed))
            for _ in range(8):
                pressed = studio.press(b"2")
                answers.append(1000 * (studio.until(b"No samples") - pressed))
                studio.press(b"1")
                studio.read(0.15)
    return curves, answers


def flooded_log(home: Path, lines: int = 1_000_000) -> tuple[list[float], list[float]]:
    """Milliseconds from a key to its answer with a quiet log, and while a million lines come into it."""
    paths = make_run(home, "flood")
    launch_fake(paths, steps=100000, seconds=0.1)
    script = (
        "import sys, time\nwith open(sys.argv[1], 'a') as f:\n for n in range(int(sys.argv[2])):\n"
        "  f.write(f'{n} ' + 'x' * 60 + chr(10))\n  n % 1000 or time.sleep(0.018)"
    )
    try:
        with terminal("-m", "studio", home=home) as studio:
            studio.until(*BRAILLE)
            studio.press(b"3")
            studio.read(3.0)
            quiet = _answers(studio)
            writer = subprocess.Popen([sys.executable, "-c", script, str(paths.output), str(lines)])
            studio.read(0.5)
            flooded = _answers(studio, while_alive=writer)
            writer.wait()
            return quiet, flooded
    finally:
        stop(paths, grace_seconds=5)


def _answers(studio: Terminal, presses: int = 120, while_alive: "subprocess.Popen[bytes] | None" = None) -> list[float]:
    """Go to and fro between two views of a run; the row of names answers at once."""
    found: list[float] = []
    while len(found) < presses and (while_alive is None or while_alive.poll() is None):
        pressed = studio.press(b"3" if len(found) % 2 else b"4")
        found.append(1000 * (studio.until(b"Notes", seconds=10) - pressed))
        studio.read(0.05 + 0.011 * (len(found) % 13))
    return found


def told(name: str, values: Sequence[float], target: str = "") -> None:
    """Print a row; a percentile needs as many values as it has parts."""
    cuts = [f"{quantiles(values, n=100)[cut - 1]:6.1f}" if len(values) >= 100 else "     -" for cut in (95, 99)]
    told = f"p50 {median(values):6.1f}  p95 {cuts[0]}  p99 {cuts[1]}  max {max(values):6.1f}  n {len(values):3}"
    print(f"{name:44} {told}  {target}", flush=True)


def _frames(home: Path) -> None:
    told("first frame, ms", first_frame(home), "wanted: p50 <= 600")


def _keys(home: Path) -> None:
    busy = ("-m", "tests.bench.terminal_app", str(home / "runs"))
    told("key to gauge, two plots at 2 Hz, ms", key_to_gauge(home, busy), "wanted: p50 <= 35, p99 <= 60")
    told("key to gauge, the configure screen, ms", key_to_gauge(home, STUDIO))


def _long(home: Path) -> None:
    long_run(home)
    curves, answers = open_long_run(home)
    told("100 000 events: key to first curve, ms", curves, "wanted: <= 300")
    told("  and to another key's answer meanwhile, ms", answers)


def _idle(home: Path) -> None:
    print(f"{'idle, bytes in 10 s':44} {while_idle(home)}  wanted: 0", flush=True)


def _running(home: Path) -> None:
    rate, resident = while_running(home)
    print(f"{'a run at 2 Hz, bytes/s':44} {rate:.0f}  wanted: <= 2048", flush=True)
    print(f"{'resident, MiB':44} {resident:.1f}  wanted: <= 60", flush=True)


def _flood(home: Path) -> None:
    quiet, flooded = flooded_log(home)
    told("log view: key to answer, ms", quiet)
    told("  while a million lines come, ms", flooded)
    print(f"{'  more at the maximum, ms':44} {max(flooded) - max(quiet):.1f}  wanted: <= 50", flush=True)


PARTS = {"frames": _frames, "keys": _keys, "long": _long, "idle": _idle, "running": _running, "flood": _flood}


def main(names: Sequence[str]) -> int:
    """Print every figure, or those of the parts that are named."""
    for name in names or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            (home / "setup.json").write_text("{}")
            PARTS[name](home)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
