"""The estimate against stored traces of the real training step: `python -m tests.bench.trace_grid` makes them anew."""

import json
import statistics
from functools import lru_cache
from typing import Any

import pytest

from studio.core.measured import height
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from tests.bench.trace_settings import TRACES, config_of, estimated_peak, estimated_stages, recipe_of


@lru_cache
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(TRACES.read_text(encoding="utf-8"))["rows"]
    return found


def traced_peak(row: dict[str, Any]) -> int:
    return max(height(parts) for parts in row["peaks"].values())


@lru_cache
def errors() -> list[float]:
    """The estimate's relative error, row by row."""
    return [estimated_peak(row) / traced_peak(row) - 1 for row in rows()]


def test_the_grid_is_wide() -> None:
    assert len(rows()) >= 60
    families = {config_of(row["model"], None)["model_type"] for row in rows()}
    assert len(families) >= 8
    for name, least in {"rank": 4, "seq_len": 6, "micro_batch": 4, "optimizer": 3, "method": 2}.items():
        assert len({row["settings"].get(name) for row in rows()}) >= least, name
    seldom = ("dora", "modules_to_save", "offload_checkpoints", "precision", "rank_pattern", "layers", "stream")
    often = ("loss", "recompute", "accumulation", "attention", "dropout", "dtype", "double_quant")
    for name in (*often, *seldom):
        assert any(name in row["settings"] for row in rows()), name


def test_half_of_the_rows_are_within_half_a_percent() -> None:
    assert statistics.median(map(abs, errors())) <= 0.005


@pytest.mark.parametrize("number", range(len(rows())), ids=lambda n: f"{rows()[n]['model']}-{n}")
def test_no_row_is_off_by_two_percent(number: int) -> None:
    assert abs(errors()[number]) <= 0.02, rows()[number]["settings"]


@pytest.mark.parametrize(
    ("stage", "median", "most_of_nine_in_ten"),
    [("forward", 0.005, 0.02), ("loss", 0.002, 0.01), ("backward", 0.005, 0.01), ("optimizer", 0.001, 0.001),
     ("eval", 0.01, 0.04)],
)  # fmt: skip
def test_each_stage_beside_its_trace(stage: str, median: float, most_of_nine_in_ten: float) -> None:
    off = sorted(abs(estimated_stages(row)[stage] / height(row["peaks"][stage]) - 1) for row in rows())
    assert statistics.median(off) <= median
    assert off[int(0.9 * len(off))] <= most_of_nine_in_ten


@pytest.mark.parametrize(
    ("model", "method", "most_gib"),
    [
        ("Llama-3.1-8B", "qlora", 7.0),
        ("Llama-3.1-8B", "lora", 16.6),
        ("Llama-2-13b-hf", "qlora", 9.2),
        ("Qwen2.5-0.5B", "qlora", 1.1),
    ],
)
def test_what_the_engine_is_built_for(model: str, method: str, most_gib: float) -> None:
    """Rank 16 on all linear maps, 1 x 2048 tokens, checkpointing, paged 8-bit AdamW."""
    wanted = {"method": method, "seq_len": 2048, "optimizer": "paged_adamw_8bit"}
    (row,) = (row for row in rows() if (row["model"], row["layers"], row["settings"]) == (model, None, wanted))
    assert traced_peak(row) / 2**30 <= most_gib


@pytest.mark.parametrize(
    ("model", "method", "tokens", "layers", "most_gib", "host_gib"),
    [
        ("Llama-3.1-8B", "lora", 2048, 32, 3.9, 14.0),
        ("Llama-2-13b-hf", "lora", 2048, 40, 4.1, 23.9),
        ("Qwen2.5-32B", "lora", 2048, 64, 7.5, 59.6),
        ("Llama-3.1-70B", "qlora", 2048, 80, 9.8, 34.8),
        ("Llama-3.1-8B", "qlora", 512, 32, 2.2, 4.3),
    ],
)
def test_what_streaming_is_built_for(
    model: str, method: str, tokens: int, layers: int, most_gib: float, host_gib: float
) -> None:
    """The same with all layers streamed; and what waits in main memory, which the estimate states."""
    wanted = {"method": method, "seq_len": tokens, "optimizer": "paged_adamw_8bit", "stream": layers}
    (row,) = (row for row in rows() if (row["model"], row["layers"], row["settings"]) == (model, None, wanted))
    assert traced_peak(row) / 2**30 <= most_gib
    host = max(parts["host"] for parts in row["peaks"].values())
    assert host / 2**30 == pytest.approx(host_gib, abs=0.05)
    shape = shape_from_config(config_of(model, None))
    # Beside the weights, what stands for them on the card: a number or two.
    assert 0 <= host - estimate_vram(shape, setup_of(recipe_of(wanted))).host.weights <= 4096
