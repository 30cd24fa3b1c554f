"""Families whose layers do much of their own: the estimate is the trace at other sizes, with every way to train."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.probe.shape import find_shape
from tests.fakes.families.wide import make_wide
from tests.jobs.family_cases import planned, traced, traced_recipe

pytestmark = pytest.mark.slow

SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Half of eight layers have experts, two have tempered queries instead of positions, and no row is cut in chunks.
    "llama4-deep": (
        "llama4",
        {"num_hidden_layers": 8, "layer_types": None, "no_rope_layers": None, "moe_layers": None},
        {"train.seq_len": 192, "train.micro_batch": 2},
    ),
    "gemma3n-long": ("gemma3n", {"vocab_size": 4096}, {"train.seq_len": 2048}),
    "llama4-heads": ("llama4", {"num_attention_heads": 32, "intermediate_size": 1024}, {"train.seq_len": 512}),
}


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("size", SIZES)
def test_the_estimate_is_the_trace_at_other_sizes(size: str, method: str, recompute: Any, tmp_path: Path) -> None:
    family, said, trained = SIZES[size]
    config = make_wide(tmp_path / family, family) / "config.json"
    values = json.loads(config.read_text())
    text = {key: value for key, value in {**values["text_config"], **said}.items() if value is not None}
    alone = tmp_path / "alone"  # without tensors, which have the sizes from before
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps({**values, "text_config": text}))
    recipe = traced_recipe(alone, method).with_("train.recompute", recompute)
    for path, value in trained.items():
        recipe = recipe.with_(path, value)
    estimate = planned(find_shape(str(alone / "config.json")), recipe)
    peak = traced(recipe)
    assert estimate.expected == pytest.approx(peak, rel=0.02)
    assert estimate.low <= peak <= estimate.high
