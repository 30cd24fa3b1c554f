"""Published mixtures of experts, from their own config.json: what QLoRA takes, and how much of them is in 4 bits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from studio.core.layer_parts import Linear
from studio.core.measured import height
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.frozen import FrozenForm, quantised_parts
from studio.core.vram.setup import setup_of
from studio.jobs.measure.trace import Target, trace

GIB = 2**30
CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "mixtures.json").read_text(encoding="utf-8")
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RECIPE = (
    Recipe()
    .with_("method", "qlora")
    .with_("adapter.rank", 16)
    .with_("adapter.targets", ATTENTION)
    .with_("train.seq_len", 2048)
    .with_("train.micro_batch", 1)
)


@pytest.mark.parametrize(
    ("name", "most_gib"), [("Qwen3-30B-A3B", 17.0), ("gpt-oss-20b", 13.2), ("Mixtral-8x7B-v0.1", 24.8)]
)
def test_a_published_mixture_fits_where_it_should(name: str, most_gib: float) -> None:
    """One row of 2048 tokens, rank 16 on the attention."""
    estimate = estimate_vram(shape_from_config(CONFIGS[name]), setup_of(RECIPE))
    assert 0.8 * most_gib < estimate.allocated.expected / GIB <= most_gib
    assert estimate.held.four_bit_share >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_estimate_is_the_trace(name: str) -> None:
    config = {**CONFIGS[name], "num_hidden_layers": 2}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:2]
    seen = trace(RECIPE, config, Target("cuda", "bf16")).log.peaks()
    estimate = estimate_vram(shape_from_config(config), setup_of(RECIPE))
    assert estimate.allocated.expected == pytest.approx(max(map(height, seen.values())), rel=0.02)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stack_takes_the_bytes_that_bitsandbytes_gives_it(double_quant: bool) -> None:
    packed, state = quantize_4bit(torch.randn(8, 192, 128), compress_statistics=double_quant, quant_type="nf4")
    held = [packed, state.absmax, state.code]
    held += [state.offset, state.state2.absmax, state.state2.code] if double_quant else []
    form = FrozenForm("nf4", double_quant, 2, 2, 2, alignment=1)
    assert sum(tensor.nbytes for tensor in held) == sum(quantised_parts(Linear("", 8 * 192, 128), form))
    bits = 8 * sum(quantised_parts(Linear("", 128 * 1536, 2048), replace(form, alignment=512))) / (128 * 1536 * 2048)
    assert bits == pytest.approx(4.127 if double_quant else 4.5, abs=1e-3)
