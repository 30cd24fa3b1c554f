"""Published training speeds beside ours. All rows, printed: `python -m tests.core.published_speed`.

The rows (tests/data/published_speed.jsonl) come from public benchmark archives; `source` names each. Repeats of one
configuration are averaged. The constants of `studio.core.throughput` were chosen on them. Rows of loops that compute as
ours does, in few kernels (torchtune, Unsloth), are compared with our own loop. `--page` prints the table of GeForce
cards that docs/speed.md holds.
"""

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from studio.core.gpu_catalogue import find_gpu
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.setup import StockSetup
from studio.core.throughput import Speed, speed_of
from studio.core.vram.setup import Setup
from studio.probe.known_models import known_names

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class ComparedSpeed:
    """A row with our estimate."""

    row: dict[str, Any]
    speed: Speed

    @property
    def ratio(self) -> float:
        """Expected over measured tokens a second."""
        return float(self.speed.expected / self.row["tokens_per_second"])

    @property
    def inside(self) -> bool:
        """Whether the measured speed lies in the range."""
        return bool(self.speed.low <= self.row["tokens_per_second"] <= self.speed.high)


@lru_cache
def model(name: str) -> ModelShape:
    """Return a model of the rows."""
    configs = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
    return shape_from_config(configs[name] if name in configs else known_names()[f"qwen/{name}".lower()].config)


def setup(row: dict[str, Any]) -> Setup:
    """Return how a row was trained."""
    same = ("method", "rank", "micro_batch", "seq_len", "dtype", "attention", "loss")
    targets = row["targets"] if isinstance(row["targets"], str) else tuple(row["targets"])
    if row.get("engine") == "studio":
        return Setup(targets=targets, compile=row.get("compile", False), **{name: row[name] for name in same})
    return StockSetup(
        targets=targets,
        kbit_prepare=row["kbit_prepare"],
        autocast=row["autocast"],
        transformers=row.get("transformers", ""),
        recompute="all" if row["grad_checkpointing"] else "none",
        **{name: row[name] for name in same},
    )


@lru_cache
def compared_speeds() -> tuple[ComparedSpeed, ...]:
    """Return every row with the estimate for its own loop and card."""
    lines = (DATA / "published_speed.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(row, speed_of(model(row["model"]), setup(row), find_gpu(row["gpu"]))) for row in rows]
    return tuple(ComparedSpeed(row, speed) for row, speed in found if speed is not None)


def consumer_table() -> str:
    """Return the rows of GeForce cards as a table in Markdown."""
    lines = ["| card | model | method | micro-batch | loop | published | estimated | range | ratio |", "|" + "---|" * 9]
    for item in compared_speeds():
        row, speed = item.row, item.speed
        if row["gpu"].startswith("RTX"):
            size, ends = f"{row['micro_batch']} x {row['seq_len']}", f"{speed.low:.0f} to {speed.high:.0f}"
            words = [row["gpu"], row["model"], row["method"], size, row["loop"], str(row["tokens_per_second"])]
            lines.append(f"| {' | '.join([*words, f'{speed.expected:.0f}', ends, f'{item.ratio:.2f}'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__" and "--page" in sys.argv:
    print(consumer_table(), end="")
elif __name__ == "__main__":
    for item in compared_speeds():
        row = item.row
        print(
            f"{row['gpu']:10} {row['model']:20} {row['method']:5} {row['micro_batch']:2} x {row['seq_len']:4} "
            f"{row['attention']:5} measured {row['tokens_per_second']:7.0f} expected {item.speed.expected:7.0f} "
            f"({item.ratio:.2f}) {'' if item.inside else 'OUTSIDE '}{row['loop']}"
        )
