"""Traces the training step of many models and recipes and stores what they hold: `python -m tests.bench.trace_grid`.

Writes tests/data/traces.json, which tests/core/test_vram_grid.py compares the estimate with, and the rows at full depth
to tests/bench/measure_results.md. Shallow models stand for deep ones in most rows: a trace is linear in equal layers,
which the rows at full depth show. `--only WORD` traces the rows whose name holds the word and prints them; `--missing`
traces what the file lacks and leaves its other rows as they are.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studio.core.measured import COMPONENTS, ELSEWHERE, height
from studio.jobs.measure.storages import Peaks
from studio.jobs.measure.trace import Target, trace
from tests.bench.trace_settings import TRACES, config_of, estimated_peak, recipe_of, rows

MIB, GIB = 2**20, 2**30
RESULTS = Path(__file__).with_name("measure_results.md")
_ABOUT = """# What a training step holds, traced

Written by `python -m tests.bench.trace_grid`: the training job's own step (model, adapter, loss, optimizer, loop) on
fake tensors, for a card of compute capability 8.0, two steps on full rows, every token learnt. No card was there: what
a trace cannot know is listed by `lora-studio measure`. The estimate is the closed form of `lora-studio plan`.
{libraries}; one core of a shared machine.
"""


def traced(model: str, layers: int | None, settings: dict[str, Any]) -> Peaks:
    """Return the bytes by stage and component for a card of compute capability 8.0."""
    recipe = recipe_of(settings)
    return trace(recipe, config_of(model, layers), Target("cuda", recipe.model.dtype)).log.peaks()


def breakdown(found: list[dict[str, Any]], libraries: dict[str, str]) -> str:
    """Return the rows at full depth as Markdown: their peaks, then bytes by stage and component."""
    rows = [row for row in found if row["layers"] is None]
    parts = [_ABOUT.format(libraries=", ".join(f"{name} {number}" for name, number in libraries.items()))]
    parts.append(
        "| model | settings | traced, GiB | estimate, GiB | difference | at its peak | seconds |\n" + "|---" * 7 + "|"
    )
    for row in rows:
        peak, expected = max(map(height, row["peaks"].values())), estimated_peak(row)
        stage = max(row["peaks"], key=lambda name: height(row["peaks"][name]))
        cells = (row["model"], _said(row), f"{peak / GIB:.3f}", f"{expected / GIB:.3f}", f"{expected / peak - 1:+.2%}")
        parts.append(f"| {' | '.join(cells)} | {stage} | {row['seconds']:.0f} |")
    for row in rows:
        parts.append(f"\n### {row['model']}: {_said(row)}\n\nMiB by stage, each at its highest point.\n")
        parts.append(f"| stage | {' | '.join((*COMPONENTS, *ELSEWHERE))} | on the card |\n" + "|---" * 11 + "|")
        for stage, sizes in row["peaks"].items():
            cells = (f"{sizes.get(name, 0) / MIB:,.1f}" for name in (*COMPONENTS, *ELSEWHERE))
            parts.append(f"| {stage} | {' | '.join(cells)} | {height(sizes) / MIB:,.1f} |")
    return "\n".join(parts) + "\n"


def _said(row: dict[str, Any]) -> str:
    recipe = recipe_of(row["settings"])
    train = recipe.train
    kept = "no checkpointing" if train.recompute == "none" else "checkpointing"
    kept += ", dequantised weights kept" if train.keep_dequantised else ""
    words = (recipe.method, f"rank {recipe.adapter.rank}", f"{train.micro_batch} x {train.seq_len}", kept)
    streamed = () if recipe.model.stream == "off" else (f"{recipe.model.stream} layers streamed",)
    return ", ".join((*words, f"{train.loss} loss", train.optimizer, *streamed))


def main() -> None:
    """Trace all rows and store them, or print some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--missing", action="store_true")
    asked = parser.parse_args()
    only, found = asked.only, []
    stored = json.loads(TRACES.read_text(encoding="utf-8"))["rows"] if asked.missing else []
    known = {json.dumps([row["model"], row["layers"], row["settings"]]): row for row in stored}
    began = time.monotonic()
    for model, layers, settings in rows():
        name = f"{model} {layers or 'all'} " + " ".join(str(value) for value in settings.values())
        if only not in name:
            continue
        if row := known.get(json.dumps([model, layers, settings])):
            found.append(row)
            continue
        started = time.monotonic()
        peaks = traced(model, layers, settings)
        seconds = round(time.monotonic() - started, 1)
        found.append({"model": model, "layers": layers, "settings": settings, "seconds": seconds, "peaks": peaks})
        peak = max(map(height, peaks.values()))
        print(f"{time.monotonic() - began:6.0f} s  {peak / 2**30:8.3f} GiB  {name}", flush=True)
    if only:
        print(json.dumps(found, indent=1))
        return
    libraries: dict[str, str] = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found)
    RESULTS.write_text(breakdown(found, libraries), encoding="utf-8")
    TRACES.write_text(f'{{"libraries":{json.dumps(libraries)},"rows":[\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
