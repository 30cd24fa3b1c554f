"""Names of adapters as vLLM looks for them: `docs/serving.md` says where its rules were read. Names only, no vLLM."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from studio.core.recipe import AdapterSection
from studio.jobs.train.adapter import attach_adapter
from tests.fakes.families import FAMILIES, config_of

WRAPPED = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
"""`orig_to_new_prefix` of Gemma 3, Mistral 3 and Qwen3-VL, whose mapping Qwen3.5 has."""
JOINED = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "in_proj_b", "in_proj_a", "in_proj_qkv", "in_proj_z"}
"""Parts of `packed_modules_mapping`."""
WHOLE = {"o_proj", "down_proj", "out_proj"}
SERVED = {
    "gemma3": r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+",
    "mistral3": r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+",
    "qwen3_5": r"language_model\.model\.layers\.\d+\.(self_attn|linear_attn|mlp)\.\w+",
    "gpt_oss": r"model\.layers\.\d+\.attn\.\w+",
}
"""Where the modules lie in vLLM's classes."""


def found_by_vllm(key: str, architecture: str) -> str:
    """Return the module that a tensor of an adapter is put on (vllm/lora/utils.py, parse_fine_tuned_lora_name)."""
    assert key.startswith("base_model.model.")
    name = key.removeprefix("base_model.model.")
    if architecture == "GptOssForCausalLM":
        name = name.replace(".self_attn.", ".attn.")
    else:
        for begins, becomes in WRAPPED.items():
            if name.startswith(begins):
                name = becomes + name.removeprefix(begins)
                break
    parts = name.split(".")
    assert parts[-1] == "weight"
    assert parts[-2] in ("lora_A", "lora_B")
    return ".".join(parts[:-2])


def keys_of(model: Any) -> list[str]:
    return list(get_peft_model_state_dict(attach_adapter(model, AdapterSection(), recompute="none")))


@pytest.mark.parametrize("name", SERVED)
def test_every_tensor_of_an_adapter_has_its_module(name: str) -> None:
    architecture = FAMILIES[name].architecture
    keys = keys_of(getattr(transformers, architecture)(config_of(name)))
    assert keys
    for key in keys:
        module = found_by_vllm(key, architecture)
        assert re.fullmatch(SERVED[name], module), module
        assert module.rpartition(".")[2] in JOINED | WHOLE, module


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_5"])
def test_names_of_the_text_class_have_none(name: str) -> None:
    """What a training through the text class would save, which vLLM does not refuse."""
    keys = keys_of(AutoModelForCausalLM.from_config(config_of(name).get_text_config()))
    assert not [key for key in keys if re.fullmatch(SERVED[name], found_by_vllm(key, FAMILIES[name].architecture))]


def test_the_page_names_the_classes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    for name in SERVED:
        assert f"| {FAMILIES[name].architecture} |" in page
    for begins, becomes in WRAPPED.items():
        assert f"`{begins}`" in page
        assert f"`{becomes}`" in page
