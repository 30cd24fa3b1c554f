"""The estimate against stored traces of the real training step: `python -m tests.bench.trace_grid` makes them anew."""

import json
import statistics
from functools import lru_cache
from typing import Any

import pytest

from studio.core.measured import height
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import attention_kernel
from studio.core.vram.setup import setup_of
from studio.core.vram.stages import stages_of
from tests.bench.trace_settings import TRACES, config_of, recipe_of


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


def estimated_peak(row: dict[str, Any]) -> int:
    shape = shape_from_config(config_of(row["model"], row["layers"]))
    setup = setup_of(recipe_of(row["settings"]))
    return stages_of(shape, setup, attention_kernel(shape, setup, None)).peak


def test_the_grid_is_wide() -> None:
    assert len(rows()) >= 60
    families = {config_of(row["model"], None)["model_type"] for row in rows()}
    assert len(families) >= 8
    for name, least in {"rank": 4, "seq_len": 6, "micro_batch": 4, "optimizer": 3, "method": 2}.items():
        assert len({row["settings"].get(name) for row in rows()}) >= least, name
    for name in ("loss", "grad_checkpointing", "accumulation", "attention", "dropout", "dtype", "double_quant"):
        assert any(name in row["settings"] for row in rows()), name


def test_half_of_the_rows_are_within_half_a_percent() -> None:
    assert statistics.median(map(abs, errors())) <= 0.005


_OPEN = {"gemma-2-2b", "phi-1_5", "stablelm-2-1_6b"}
"""Models in which the estimate still lacks something that the trace shows: up to 4 %."""


@pytest.mark.parametrize("number", range(len(rows())), ids=lambda n: f"{rows()[n]['model']}-{n}")
def test_no_row_is_off_by_two_percent(number: int) -> None:
    row = rows()[number]
    assert abs(errors()[number]) <= (0.04 if row["model"] in _OPEN else 0.02), row["settings"]
