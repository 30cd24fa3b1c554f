"""The stock loop's closed form against traces of that loop itself, architecture by architecture.

Few layers of models as they are published: what a layer adds is the same for every one of them.
"""

import json
from dataclasses import replace
from typing import Any

import pytest

from studio.core.shape_from_config import shape_from_config
from studio.core.stock.setup import stock_setup
from studio.core.vram.setup import Setup
from tests.bench.trace_settings import DATA, PHI_3_MINI
from tests.core.loops import kernel_of, staged
from tests.core.stock_loop import traced_stages

pytestmark = pytest.mark.slow

KNOWN: dict[str, Any] = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
SANTACODER = {
    **{"model_type": "gpt_bigcode", "n_embd": 2048, "n_inner": 8192, "n_layer": 24, "n_head": 16, "vocab_size": 49280},
    **{"n_positions": 2048, "multi_query": True, "activation_function": "gelu_pytorch_tanh"},
    **{"bos_token_id": 0, "eos_token_id": 0},
}
BLOOM = {"model_type": "bloom", "hidden_size": 2048, "n_layer": 24, "n_head": 16, "vocab_size": 250880}
PHI = {**KNOWN["phi-1_5"], "resid_pdrop": 0.1, "embd_pdrop": 0.1}
FALCON = KNOWN["falcon-7b"]
FALCON_NEW = {
    **{**FALCON, "new_decoder_architecture": True, "num_kv_heads": 8},
    **{"num_attention_heads": 64, "hidden_size": 4096},
}
LONG = Setup(method="lora", rank=8, micro_batch=1, seq_len=2048, loss="full")
WIDE = Setup(method="lora", rank=64, micro_batch=4, seq_len=512, loss="full")
QLORA = replace(LONG, method="qlora")

CASES: list[tuple[str, dict[str, Any], Setup, dict[str, Any]]] = [
    ("santacoder", SANTACODER, LONG, {}),
    ("santacoder-upcast", SANTACODER, replace(QLORA, targets=("c_attn",)), {"kbit_prepare": True}),
    ("santacoder-qlora", SANTACODER, QLORA, {"kbit_prepare": False}),
    ("santacoder-kept", SANTACODER, replace(WIDE, recompute="none"), {}),
    ("santacoder-eager", SANTACODER, replace(WIDE, attention="eager"), {}),
    ("bloom-qlora", BLOOM, QLORA, {"kbit_prepare": False}),
    ("phi-dropped", PHI, replace(WIDE, recompute="none"), {}),
    ("phi-qlora", PHI, QLORA, {"kbit_prepare": False}),
    ("falcon", FALCON, LONG, {}),
    ("falcon-kept", FALCON, replace(WIDE, recompute="none"), {"autocast": True}),
    ("falcon-eager", FALCON, replace(LONG, attention="eager"), {}),
    ("falcon-eager-autocast", FALCON, replace(LONG, attention="eager"), {"autocast": True}),
    ("falcon-new-kept", FALCON_NEW, replace(WIDE, recompute="none"), {}),
    ("gemma2", KNOWN["gemma-2-9b"], replace(WIDE, dropout=0.05), {}),
    ("gemma-upcast", KNOWN["gemma-2b"], QLORA, {"kbit_prepare": True}),
    ("phi3", PHI_3_MINI, WIDE, {}),
    ("phi3-windowed", PHI_3_MINI, LONG, {}),
    ("phi3-windowed-kept", PHI_3_MINI, replace(LONG, recompute="none"), {}),
]


@pytest.mark.parametrize(("values", "setup", "loop"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_step_of_the_stock_loop(values: dict[str, Any], setup: Setup, loop: dict[str, Any]) -> None:
    values = {key: 2 if key in ("num_hidden_layers", "n_layer") else value for key, value in values.items()}
    values.pop("layer_types", None)
    setup = stock_setup(setup, transformers="5.24", **loop)
    shape = shape_from_config(values)
    expected = staged(shape, setup, kernel_of(shape, setup, None)).by_name
    traced = traced_stages(values, setup)
    assert max(expected[stage] for stage in traced) == pytest.approx(max(traced.values()), rel=0.002)
    # A layer's own gradients are in its marks, and those of other layers may be there or not.
    assert expected["backward"] == pytest.approx(traced["backward"], rel=0.03)
