"""`make soak`: two hundred kills with the whole table of faults, and a thousand events a second with three viewers.

Run: `python -m tests.faults.soak [--kills N] [--seed N] [--minutes M] [--out FILE]`, as root on Linux for faults that
mount a disk. What was seen is written to the file, with seed and commit. Half an hour with the defaults.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

import psutil
import pytest

from studio.core.events import StepDone, Unknown
from studio.runs.log import read_events
from studio.runs.supervise import launch
from tests.bench.bench_terminal import BRAILLE, terminal
from tests.fakes.runs import CHECKOUT, fake_environment, make_run
from tests.faults.flood import RATE
from tests.faults.table import Fault, lines_of, rows_of

_WINDOW_SECONDS = 5.0
_ALONE_SHARE = 0.3
"""Of the flood's time, at its end: how long viewers are stopped and continued in turns, to see what they cost."""


class _Rows:
    """Collects the table's rows of a test run."""

    def __init__(self) -> None:
        self.rows = list[Fault]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.rows += rows_of(report.user_properties)


def faults(kills: int, seed: int) -> tuple[bool, list[str]]:
    """Make every fault, and return whether all ended as they must, and the table."""
    os.environ.update(FAULTS_KILLS=str(kills), FAULTS_SEED=str(seed))
    rows = _Rows()
    words = [str(CHECKOUT / "tests" / "faults"), "-q", "-m", "slow", "-n", "2", "--dist", "load"]
    code = pytest.main(words, plugins=[rows])
    return code == 0, lines_of(rows.rows)


def flood(minutes: float) -> list[str]:
    """Let three viewers follow a thousand events a second, and return what that was like.

    Two are the studio's screens in terminals of their own, one is `runs attach`.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "setup.json").write_text("{}")
        paths = make_run(home, "flood")
        handle = launch(
            paths, "tests.faults.flood", environment=fake_environment() | {"FLOOD_SECONDS": str(60 * minutes)}
        )
        attach = [
            sys.executable,
            "-m",
            "studio",
            "runs",
            "attach",
            paths.name,
            "--json",
            "--runs-dir",
            str(home / "runs"),
        ]
        with (
            terminal("-m", "studio", home=home) as one,
            terminal("-m", "studio", home=home) as two,
            subprocess.Popen(attach, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as three,
        ):
            viewers = [psutil.Process(pid) for pid in (one.pid, two.pid, three.pid)]
            for studio in (one, two):
                studio.until(*BRAILLE)
            before, began = _times(viewers), time.monotonic()
            end = began + 60 * minutes * (1 - _ALONE_SHARE) - 10
            while time.monotonic() < end:
                one.read(0.2)
                two.read(0.2)
            seconds = time.monotonic() - began
            shares = [(after - was) / seconds for was, after in zip(before, _times(viewers), strict=True)]
            windows = list[tuple[float, float, bool]]()
            while handle.process.poll() is None:
                on = len(windows) % 2 == 1
                for viewer in viewers:
                    viewer.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
                start, until = time.time(), time.monotonic() + _WINDOW_SECONDS
                while time.monotonic() < until:
                    if on:
                        one.read(0.1)
                        two.read(0.1)
                    else:
                        time.sleep(0.1)
                windows.append((start + 0.5, time.time(), on))
            for viewer in viewers:
                viewer.send_signal(signal.SIGCONT)
            seen = json.loads(three.communicate(timeout=120)[0])["steps"]
        return [*_told(read_events(paths.events), seen), _shares(shares), *_slowed(read_events(paths.events), windows)]


def _times(viewers: list[psutil.Process]) -> list[float]:
    return [sum(viewer.cpu_times()[:2]) for viewer in viewers]


def _shares(shares: list[float]) -> str:
    words = ", ".join(f"{100 * share:.1f} %" for share in shares)
    return f"a viewer took of a core (two screens, one runs attach): {words}; wanted: at most 3 % each"


def _told(events: list[object], seen: int) -> list[str]:
    steps = [event for event in events if isinstance(event, StepDone)]
    lost = sum(event.step != place for place, event in enumerate(steps, 1))
    strange = sum(isinstance(event, Unknown) for event in events)
    rate = len(steps) / max(1e-9, steps[-1].at - steps[0].at)
    return [
        f"{len(steps)} steps told at {rate:.0f} a second (wanted {RATE:.0f}); out of order or lost: {lost}; "
        f"torn: {strange}; the last that runs attach saw: {seen}"
    ]


def _slowed(events: list[object], windows: list[tuple[float, float, bool]]) -> list[str]:
    kinds = {"by the clock": "seconds", "by the process's own time": "grad_norm"}
    found = []
    for words, field in kinds.items():
        with_, without = list[float](), list[float]()
        for event in events:
            if isinstance(event, StepDone):
                on = next((on for start, end, on in windows if start <= event.at < end), None)
                if on is not None:
                    (with_ if on else without).append(getattr(event, field))
        if with_ and without:
            more = 100 * (median(with_) / median(without) - 1)
            found.append(
                f"a step took {1e3 * median(with_):.4f} ms with the viewers, {1e3 * median(without):.4f} ms while they "
                f"were stopped, {words}: {more:+.2f} %; wanted: at most +1 %"
            )
    return found


def main() -> int:
    """Run both parts; returns 1 where a fault did not end as it must."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("build") / "soak.md")
    args = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=CHECKOUT, check=False)
    lines = [f"# Soak of {datetime.now():%Y-%m-%d %H:%M}", "", f"commit {git.stdout.strip() or 'unknown'}", ""]
    lines += ["## Events", "", *(flood(args.minutes) if args.minutes else ["not run"]), ""]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    whole, table = faults(args.kills, args.seed) if args.kills else (True, ["not run"])
    lines += ["## Faults", "", f"seed {args.seed}, {args.kills} kills at random moments", "", *table]
    args.out.write_text("\n".join(lines) + "\n")
    print(f"written: {args.out}")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
