"""Weights that are quantised already: what configs say of them, what training does with them, what is planned."""

import json
from dataclasses import replace
from typing import Any

import pytest

from studio.core.base_form import refusal
from studio.core.quantised_base import QuantisedBase, quantised_base
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.setup import StockSetup
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import Setup
from tests.core.loops import estimated
from tests.core.published_rows import DATA, shapes

LLAMA = shapes()["Llama-3.1-8B"]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, QuantisedBase("gptq", 4)),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, QuantisedBase("awq", 4)),
        ({"quantization_config": {"quant_method": "fp8"}}, QuantisedBase("fp8", 8)),
        ({"quantization_config": {"quant_method": "mxfp4"}}, QuantisedBase("mxfp4", 4)),
        ({"quantization_config": COMPRESSED}, QuantisedBase("compressed-tensors", 4)),
        ({"compression_config": COMPRESSED}, QuantisedBase("compressed-tensors", 4)),
        ({"quantization_config": NF4}, QuantisedBase("bitsandbytes", 4, "nf4", True)),
        ({"quantization_config": {"load_in_4bit": True}}, QuantisedBase("bitsandbytes", 4, "fp4", False)),
        ({"quantization_config": {"load_in_8bit": True}}, QuantisedBase("bitsandbytes", 8)),
        (
            {"quantization_config": {**NF4, "quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head", 3]}},
            QuantisedBase("bitsandbytes", 4, "nf4", True, ("lm_head",)),
        ),
        (
            {
                "quantization_config": {
                    **NF4,
                    "llm_int8_skip_modules": ["model.language_model.layers.0.mlp", "a b", "\x1b", "lm_head", "lm_head"],
                }
            },
            QuantisedBase("bitsandbytes", 4, "nf4", True, ("model.layers.0.mlp", "lm_head")),
        ),
        ({"text_config": {"quantization_config": {"quant_method": "hqq", "nbits": 3}}}, QuantisedBase("hqq", 3)),
        ({"quantization": {"bits": 4, "group_size": 64}}, QuantisedBase("mlx", 4)),
        ({"quantization_config": {}}, QuantisedBase("unknown")),
        ({"quantization_config": {"quant_method": 7, "bits": "4"}}, QuantisedBase("unknown")),
        ({"quantization_config": {"quant_method": "gptq", "bits": -(10**30)}}, QuantisedBase("gptq")),
        ({"quantization_config": {"quant_method": "x", "config_groups": {"g": []}}}, QuantisedBase("x")),
        ({"quantization_config": "gptq"}, None),
    ],
)
def test_what_configs_say(config: dict[str, Any], expected: QuantisedBase | None) -> None:
    assert quantised_base(config) == expected


def test_only_four_bits_of_bitsandbytes_can_be_trained_on_and_only_by_qlora() -> None:
    four = QuantisedBase("bitsandbytes", 4)
    assert refusal(None, "lora") == refusal(None, "qlora") == refusal(four, "qlora") == ""
    assert "take method qlora" in refusal(four, "lora")
    for other in (QuantisedBase("bitsandbytes", 8), QuantisedBase("gptq", 4), QuantisedBase("nvfp4", 4)):
        for method in ("lora", "qlora"):
            assert "the original 16-bit model" in refusal(other, method)
    assert "GGUF" in refusal(QuantisedBase("gguf"), "qlora")


def test_mxfp4_is_brought_into_the_form_that_training_wants() -> None:
    base = QuantisedBase("mxfp4", 4)
    assert refusal(base, "lora") == refusal(base, "qlora") == ""
    said = [estimated(replace(LLAMA, quantised=base), Setup(method=method)).notes[0] for method in ("lora", "qlora")]
    assert "written out in 16 bit while it is loaded" in said[0]
    assert "another 4-bit code while it is loaded" in said[1]
    assert all("a merge wants 16 bit" in note for note in said)


def test_a_hostile_name_is_shown_harmless() -> None:
    found = quantised_base({"quantization_config": {"quant_method": "\x1b[2J" + "x" * 500}})
    assert found is not None
    assert "\x1b" not in refusal(found, "lora")
    assert len(refusal(found, "lora")) < 250


@pytest.mark.parametrize("engine", [Setup, StockSetup])
def test_a_base_in_four_bits_is_planned_as_it_lies(engine: type[Setup]) -> None:
    single = engine(loss="full", quant_type="fp4", double_quant=False)
    double = replace(single, quant_type="nf4", double_quant=True)
    expected = {wish: estimated(LLAMA, wish) for wish in (single, double)}
    lies = replace(LLAMA, quantised=QuantisedBase("bitsandbytes", 4, "nf4", True))
    for wish in (single, double):
        found = estimated(lies, wish)
        assert found.components == expected[double].components
        assert "planned as it is, nf4 with double quantisation" in found.notes[0]
    kept = replace(LLAMA, quantised=QuantisedBase("bitsandbytes", 4, "nf4", True, ("lm_head", "model.layers.0.mlp")))
    mlp = sum(linear.weights for linear in LLAMA.groups[0].layer.mlp)
    more = estimated(kept, double).components.base - expected[double].components.base
    assert more == pytest.approx(mlp * (2 - 0.516), rel=0.01)


def test_eight_bits_are_planned_in_the_stock_loop_and_refused_in_ours() -> None:
    lies = replace(LLAMA, quantised=QuantisedBase("bitsandbytes", 8))
    stock, wish = StockSetup(loss="full"), Setup()
    expected = estimated(LLAMA, replace(stock, quant_type="int8"))
    assert estimated(lies, stock).components == expected.components
    assert estimated(lies, wish).components == estimated(LLAMA, wish).components
    assert "train refuses this one" in estimated(lies, wish).notes[0]


def test_other_forms_are_planned_from_their_original_and_said() -> None:
    for name in ("gptq", "awq", "fp8", "nvfp4", "compressed-tensors"):
        shape = replace(LLAMA, quantised=QuantisedBase(name, 4))
        for setup in (Setup(), Setup(method="lora"), StockSetup(loss="full")):
            found, plain = estimated(shape, setup), estimated(LLAMA, setup)
            assert found.allocated == plain.allocated
            assert found.notes == (found.notes[0], *plain.notes)
            assert name in found.notes[0]
            assert "16-bit original" in found.notes[0] or "original 16-bit" in found.notes[0]


def test_the_document_names_it() -> None:
    config = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))["SmolLM2-135M"]
    shape = shape_from_config({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    document = plan_to_dict(estimated(shape, Setup()), shape, Setup())
    assert document["model"]["quantisation"]["method"] == "gptq"
    assert plan_to_dict(estimated(LLAMA, Setup()), LLAMA, Setup())["model"]["quantisation"] is None
