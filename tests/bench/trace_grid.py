"""Traces the training step of many models and recipes and stores what they hold: `python -m tests.bench.trace_grid`.

Writes tests/data/traces.json, which tests/core/test_vram_grid.py compares the estimate with. Shallow models stand for
deep ones in most rows: a trace is linear in equal layers, which the rows at full depth show. `--only WORD` traces the
rows whose name holds the word and prints them, without writing.
"""

import argparse
import json
import time
from importlib.metadata import version
from typing import Any

from studio.core.measured import height
from studio.jobs.measure.storages import Peaks
from studio.jobs.measure.trace import Target, trace
from tests.bench.trace_settings import TRACES, config_of, recipe_of, rows


def traced(model: str, layers: int | None, settings: dict[str, Any]) -> Peaks:
    """Return the bytes by stage and component for a card of compute capability 8.0."""
    recipe = recipe_of(settings)
    return trace(recipe, config_of(model, layers), Target("cuda", recipe.model.dtype)).log.peaks()


def main() -> None:
    """Trace all rows and store them, or print some."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD")
    only = parser.parse_args().only
    found = []
    began = time.monotonic()
    for model, layers, settings in rows():
        name = f"{model} {layers or 'all'} " + " ".join(str(value) for value in settings.values())
        if only not in name:
            continue
        peaks = traced(model, layers, settings)
        found.append({"model": model, "layers": layers, "settings": settings, "peaks": peaks})
        peak = max(map(height, peaks.values()))
        print(f"{time.monotonic() - began:6.0f} s  {peak / 2**30:8.3f} GiB  {name}", flush=True)
    if only:
        print(json.dumps(found, indent=1))
        return
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found)
    TRACES.write_text(f'{{"libraries":{json.dumps(libraries)},"rows":[\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
