"""What a look at a run with a log of 3 million lines costs: `python -m tests.bench.bench_looking [--lines N]`.

Processor time of whole processes, start of Python included, with the index that the run's worker keeps and, for the
first look only, without one; for a run that has ended, one that was killed in the midst of a line, and one that lives.
The last figure is the first look of the studio at the same run, in a process that runs already.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from studio.core.events import Evaluated, Finished, MemorySeen, Planned, RunEvent, Saved, Started, StepDone
from studio.core.recipe import Recipe
from studio.runs.job import write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.log import EventWriter
from studio.runs.worker import Worker
from studio.tui.feed import RunFeed

_TIMES = 5
_AT_ONCE = 1000


def main() -> int:
    """Make the log, look at it, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=3_000_000)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as root:
        paths = new_run(Path(root), "long", time.time())
        write_job(paths, Recipe(name="long"))
        print(f"{lines} lines, median of {_TIMES} processes; seconds of processor time")
        began = time.process_time()
        _write(paths, lines)
        print(f"writing, a line: {1e6 * (time.process_time() - began) / lines:.1f} us")
        print(f"log {paths.events.stat().st_size / 1e6:.0f} MB, index {paths.index.stat().st_size / 1e6:.2f} MB")
        index = paths.index.read_bytes()
        paths.index.unlink()
        print(f"ended, no index: show {_cost(paths, 'show', times=1):.1f} (this makes the index)")
        _tell("ended", paths)
        paths.index.write_bytes(index[:-9])
        with paths.events.open("ab") as log:
            log.write(b'{"schema": 1, "kind": "Sta')
        _tell("killed, torn log and index", paths)
        with Worker(paths) as worker:
            worker.emit(Started, job="train", resumed_from=lines // 2)
            _tell("live", paths)
            worker.emit(Finished, outcome="done")
        shutil.rmtree(paths.root)
    return 0


def _write(paths: RunPaths, lines: int) -> None:
    writer, step = EventWriter(paths.events), 0
    writer.emit(Started, job="train", method="lora", model="m")
    writer.emit(Planned, total_steps=lines, trainable_parameters=1, rows=10, held_out_rows=2, device="cpu",
                dtype="fp32", loss_path="chunked")  # fmt: skip
    written = 2
    while written < lines:
        events: list[RunEvent] = []
        for _ in range(_AT_ONCE):
            step += 1
            at = 1.7e9 + 0.1 * step
            events.append(StepDone(at=at, step=step, loss=3 - step / 1e7 + hash(at) % 97 / 1000, learning_rate=1e-4,
                                   grad_norm=1.1, tokens=512, seconds=0.1, loss_tokens=300))  # fmt: skip
            if step % 2:
                events.append(MemorySeen(at=at, step=step, stage="step", resident_bytes=10**9 + step % 7919,
                                         resident_peak_bytes=2 * 10**9 + step))  # fmt: skip
        events.append(Evaluated(at=at, step=step, loss=3 - step / 1e7, loss_tokens=200, rows=2, seconds=1.0))
        if step % 10_000 == 0:
            events.append(Saved(at=at, what="checkpoint", path=f"checkpoints/step-{step}", step=step))
        writer.write_all(events)
        written += len(events)
    writer.close()


def _tell(state: str, paths: RunPaths) -> None:
    feed = RunFeed(paths)
    began = time.process_time()
    feed.look()
    looked = time.process_time() - began
    costs = {verb: _cost(paths, verb) for verb in ("show", "list")}
    print(f"{state}: show {costs['show']:.3f}, list {costs['list']:.3f}, first look of the studio {looked:.3f}")


def _cost(paths: RunPaths, verb: str, times: int = _TIMES) -> float:
    """Return the median of the processor seconds of a verb, system time included."""
    named: Sequence[str] = [paths.name] if verb == "show" else []
    costs = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "studio", "runs", verb, *named, "--json", "--runs-dir", str(paths.root.parent)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return sorted(costs)[len(costs) // 2]


if __name__ == "__main__":
    sys.exit(main())
