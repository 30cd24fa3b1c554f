"""How well one set of constants describes published training speeds, and what it says of rows it was not fitted on.

`python -m tests.bench.bench_speed` fits the roofline's shares to one source and asks it for another; the seconds to
launch a layer stay as they are. `python -m tests.core.published_speed` prints every row with the program's constants.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any

from studio.core import throughput
from studio.core.gpu_catalogue import Gpu, find_gpu
from studio.core.step_work import StepWork, step_work
from studio.core.throughput import Sustained
from tests.core.published_speed import compared_speeds, model, setup

Row = tuple[dict[str, Any], StepWork, Gpu, float]
Chosen = Callable[[dict[str, Any]], bool]

_SHARES = (
    (0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9),
    (0.15, 0.25, 0.35, 0.5),
    (0.4, 0.5, 0.65, 0.8, 0.9, 1.2),
    (0.15, 0.3, 0.6),
)


def rows() -> list[Row]:
    """Return every published row with its work, its card and the seconds of a micro-batch."""
    return [
        (
            item.row,
            step_work(model(item.row["model"]), setup(item.row)),
            find_gpu(item.row["gpu"]),
            item.row["micro_batch"] * item.row["seq_len"] / item.row["tokens_per_second"],
        )
        for item in compared_speeds()
    ]


def ratios(found: list[Row], sustained: Sustained) -> list[float]:
    """Return expected over measured seconds of each row."""
    return [throughput._seconds(work, gpu, sustained) / seconds for _, work, gpu, seconds in found]


def fitted(found: list[Row]) -> Sustained:
    """Return the shares with the least mean error on these rows."""
    return min(
        (Sustained(*shares, spread=1.0, basis="") for shares in product(*_SHARES)),
        key=lambda sustained: sum(abs(math.log(ratio)) for ratio in ratios(found, sustained)),
    )


def crossed(found: list[Row]) -> Iterator[tuple[str, int, list[float]]]:
    """Yield what was fitted on what and asked for what, on how many rows, and the ratios."""
    a100_fms: Chosen = lambda row: "fms-acceleration" in row["source"]  # noqa: E731
    a100_qwen: Chosen = lambda row: "Qwen" in row["source"]  # noqa: E731
    a100: Chosen = lambda row: row["gpu"] == "A100 80GB"  # noqa: E731
    l40s: Chosen = lambda row: row["gpu"] == "L40S"  # noqa: E731
    rtx4090: Chosen = lambda row: row["gpu"] == "RTX 4090"  # noqa: E731
    rtx5090: Chosen = lambda row: row["gpu"] == "RTX 5090"  # noqa: E731
    t4_new: Chosen = lambda row: "final-t4" in row["source"]  # noqa: E731
    t4_old: Chosen = lambda row: row["gpu"] == "Tesla T4" and not t4_new(row)  # noqa: E731
    for name, learnt, asked in (
        ("A100: fms-acceleration -> Qwen's README", a100_fms, a100_qwen),
        ("A100: Qwen's README -> fms-acceleration", a100_qwen, a100_fms),
        ("A100 -> L40S", a100, l40s),
        ("RTX 4090 -> RTX 5090, other models", rtx4090, rtx5090),
        ("T4: sweep of four models -> six other models", t4_old, t4_new),
    ):
        sustained = fitted([row for row in found if learnt(row[0])])
        answers = ratios([row for row in found if asked(row[0])], sustained)
        yield name, len(answers), answers


def main() -> None:
    """Print the table."""
    for name, count, answers in crossed(rows()):
        errors = [abs(ratio - 1) for ratio in answers]
        print(f"{name:46} {count:3} rows: median error {median(errors):.0%}, worst {max(errors):.0%}")


if __name__ == "__main__":
    main()
