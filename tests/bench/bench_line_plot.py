"""What a line plot costs: the two lines of plotext, and whole repaints against changed spans. Prints a table of ratios.

    pip install --target /tmp/p6 'plotext>=6'
    python -m tests.bench.bench_line_plot [FOLDER_WITH_ANOTHER_PLOTEXT ...]

For each plotext: milliseconds to import, CPU milliseconds to draw one plot of 72 x 18 and of 118 x 30 cells, and KiB/s
that an app with two plots writes to a pseudo-terminal of 120 x 40 at 2 redraws a second, with 10 new points a second.
It also hands each a NaN: one exit code tells an exception (1) from an abort of the whole process (negative signal).
Each measurement runs in its own process. The drawing for plotext 6 lives here, not in the widgets.
"""

# ruff: noqa: S311, S606  the noise is no secret; a child on its own terminal

import argparse
import fcntl
import json
import math
import os
import pty
import random
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent.parent
STEPS = 1200


def measure(plotext_folder: str | None) -> dict[str, float]:
    """Return the figures of one installation of plotext, by running this file in fresh processes."""
    figures: dict[str, float] = {}
    for job in ("cost", "whole", "spans", "nan"):
        runs = [_child(job, plotext_folder) for _ in range(5 if job == "cost" else 1)]
        for key in runs[0]:
            figures[key] = min(run[key] for run in runs)
    return figures


def _child(job: str, plotext_folder: str | None) -> dict[str, float]:
    path = [folder for folder in (plotext_folder, str(HERE)) if folder]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, __file__, "--job", job]
    if job == "nan":
        return {"exit after NaN": float(subprocess.run(command, env=env, check=False, capture_output=True).returncode)}
    if job == "cost":
        return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    return {f"{job} KiB/s": _bytes_per_second(command, env) / 1024}


def _bytes_per_second(command: list[str], env: dict[str, str], warm_up: float = 4.0, seconds: float = 10.0) -> float:
    """Run a program on a pseudo-terminal of 120 x 40 and count what it writes after a warm-up."""
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        os.execvpe(command[0], command, env)
    begin, count = time.monotonic(), 0
    while (now := time.monotonic() - begin) < warm_up + seconds:
        ready, _, _ = select.select([master], [], [], 0.1)
        if ready:
            size = len(os.read(master, 65536))
            count += size if now > warm_up else 0
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(master)
    return count / seconds


def _losses(count: int) -> list[float]:
    noise = random.Random(1)
    return [3 * math.exp(-x / 80) + 0.8 + noise.gauss(0, 0.15) for x in range(count)]


def _cost() -> dict[str, float]:
    import textual.app  # noqa: F401  shared with the app, so not part of plotext's import

    begin = time.perf_counter()
    import plotext

    figures = {"import ms": (time.perf_counter() - begin) * 1000}
    use_installed_plotext()
    from widgets.line_picture import Curve, LinePicture

    for width, height in ((72, 18), (118, 30)):
        picture = LinePicture((Curve("raw", "", "faint"), Curve("mean", ""), Curve("held", "", "dots", 2)))
        picture.x_total = STEPS
        picture.extend("raw", range(1000), _losses(1000))
        picture.extend("mean", range(1000), [3 * math.exp(-x / 80) + 0.8 for x in range(1000)])
        picture.extend("held", range(0, 1000, 50), [3 * math.exp(-x / 80) + 1 for x in range(0, 1000, 50)])
        picture.rows(width, height)
        begin = time.process_time()
        for _ in range(30):
            picture.rows(width, height)
        figures[f"draw {width}x{height} ms"] = (time.process_time() - begin) / 30 * 1000
    figures["version"] = float(plotext.__version__.rpartition(".")[0])
    return figures


def _app(spans: bool) -> None:
    from textual.app import App, ComposeResult

    from widgets.line_plot import Curve, LinePlot, Reference

    class TwoPlots(App[None]):
        def compose(self) -> ComposeResult:
            yield LinePlot((Curve("raw", "each", "faint"), Curve("mean", "mean")), title="loss", x_label="step", id="a")
            yield LinePlot((Curve("raw", "allocated"),), title="memory", from_zero=True, x_label="step", id="b")

        def on_mount(self) -> None:
            self.at, self.losses = 0, _losses(STEPS)
            for plot in self.query(LinePlot):
                plot.x_total = STEPS
            self.query_one("#b", LinePlot).reference = Reference(8, "predicted")
            self.feed(100)
            self.set_interval(0.5, lambda: self.feed(5))

        def feed(self, count: int) -> None:
            loss, memory = self.query_one("#a", LinePlot), self.query_one("#b", LinePlot)
            steps = range(self.at, self.at + count)
            self.at += count
            loss.extend("raw", steps, [self.losses[step] for step in steps])
            loss.extend("mean", steps, [3 * math.exp(-step / 80) + 0.8 for step in steps])
            memory.extend("raw", steps, [5 + (step % 7) / 7 for step in steps])
            if not spans:
                for plot in (loss, memory):
                    plot.refresh()

    use_installed_plotext()
    TwoPlots().run()


def _nan() -> None:
    import plotext as plt

    if plt.__version__.startswith("6"):
        plt.figure.draw(plt.figure.signal([0, 1, 2], [1.0, math.nan, 2.0]).lines())
        plt.figure.build()
    else:
        plt.plot([0, 1, 2], [1.0, math.nan, 2.0])
        plt.build()


def use_installed_plotext() -> None:
    """With plotext 6 on the path, draw through its figure object instead of the widgets' plotext 5 calls."""
    import plotext

    if plotext.__version__.startswith("6"):
        import widgets.line_picture

        widgets.line_picture.draw = _draw_with_6  # type: ignore[assignment]


def _draw_with_6(frame: Any, traces: Any) -> Any:
    import plotext as plt

    from widgets.plot_canvas import _MARKERS, _rows

    figure = plt.figure
    figure.clear.all()
    figure.theme("colorless")
    figure._set_size(frame.width, frame.height)  # the public plot_size is held to the size of the terminal
    figure.ruler("x").lim(*frame.x_range).ticks([x for x, _ in frame.x_ticks], [label for _, label in frame.x_ticks])
    figure.ruler("y").lim(*frame.y_range).ticks([y for y, _ in frame.y_ticks], [label for _, label in frame.y_ticks])
    figure.axes(False, axis=0, side=1)
    figure.axes(False, axis=1, side=1)
    for trace in traces:
        marker = plt.marker(_MARKERS[trace.kind])._set_pixel(plt.pixel(foreground=trace.look))
        for piece in trace.pieces:
            signal = figure.signal([x for x, _ in piece], [y for _, y in piece], marker=marker)
            figure.draw(signal.lines() if trace.kind == "line" else signal)
    return _rows(figure.build().string(), frame.width, frame.height)


def _ratio(value: float, base: float) -> str:
    return f"{value / base:8.2f}" if base > 0 else " " * 8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="folders with another plotext, made by pip install --target")
    parser.add_argument("--job", choices=("cost", "whole", "spans", "nan"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job == "cost":
        print(json.dumps(_cost()))
    elif arguments.job == "nan":
        _nan()
    elif arguments.job:
        _app(arguments.job == "spans")
    else:
        columns = [measure(None), *(measure(folder) for folder in arguments.folders)]
        print(f"{'':18}" + "".join(f"plotext {figures['version']:<6}{'ratio':>8}   " for figures in columns))
        for key in (key for key in columns[0] if key != "version"):
            cells = [f"{figures[key]:14.2f}{_ratio(figures[key], columns[0][key])}   " for figures in columns]
            print(f"{key:18}" + "".join(cells))
        for figures in columns:
            share = figures["spans KiB/s"] / figures["whole KiB/s"]
            print(f"changed spans write {share:.3f} of whole repaints (plotext {figures['version']})")


if __name__ == "__main__":
    main()
