"""The walk on tiny models of many families: block by block it is the whole model, to the bit where dtypes agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.variants import AdapterForms
from studio.jobs.audit.walk import Walk, batches_of
from studio.jobs.base.load import FourBit
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.probe.adapter_folder import find_adapter
from tests.jobs.audit_cases import CPU, examples, plain_figures, rounded, variants_of
from tests.jobs.merge_cases import make_adapter, make_base

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 120, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "phi3": {},
    "mistral": {"sliding_window": 8},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.0625},
    "gpt_neox": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
}
ROWS = (30, 12, 12, 21, 5)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model of a family in a folder, fp32."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(request.param, **{**SMALL, **FAMILIES[request.param]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_is_the_whole_model_to_the_bit_and_finds_what_rounding_costs(family: Path) -> None:
    rows = examples(*ROWS, vocabulary=120)
    parts, variants = variants_of(family, ["16-bit", "nf4"])
    walk = Walk(parts, variants, rows, device=CPU)
    assert walk.run(lambda fraction, detail: None, lambda carried: False)
    whole = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    with torch.no_grad(), walk._settled(variants[0]):
        for index, batch in enumerate(batches_of(rows)):
            states = whole.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
            assert torch.equal(walk._after(variants[0], index, batch), states)
    four = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    change = rounded("nf4")
    names = {name for block in walk.carried.seen for name in block.roundings["nf4"]}
    assert names
    for name in names:
        module = four.get_submodule(name)
        turned = isinstance(module, Conv1D)  # transformers quantises GPT-2's weights turned
        weight = change(name, module.weight.data.t().contiguous() if turned else module.weight.data)
        module.weight.data = weight.t() if turned else weight
    for name, parameter in four.named_parameters():
        if parameter.dim() == 3 and ".experts." in name:
            parameter.data = change(name, parameter.data)
    found = walk.scores()
    loss, kl, same = plain_figures(four, whole, rows)
    assert float(found["nf4"].loss.mean()) == pytest.approx(loss, rel=1e-4)
    assert float(found["nf4"].kl.mean()) == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert float(found["nf4"].same.double().mean()) == pytest.approx(same, abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_an_adapter_on_a_rounded_base_is_pefts(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = make_adapter(tmp_path / "adapter", base, **{"target_modules": ["q_proj", "o_proj"], **targets})
    skeleton = build_skeleton(base, find_adapter(adapter))
    weights = FolderWeights.of(base)
    forms = AdapterForms(weights, skeleton, FourBit("nf4", double_quant=False))
    four, change = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), rounded("nf4")
    for block in parts_of(weights.clean).blocks:
        for path, module in block[1].named_modules():
            real = four.get_submodule(f"{block[0]}.{path}" if path else block[0])
            if isinstance(module, torch.nn.Linear):
                real.weight.data = change("", real.weight.data)
            elif isinstance(module, Conv1D):
                real.weight.data = change("", real.weight.data.t().contiguous()).t().contiguous()
    wanted = PeftModel.from_pretrained(four, str(adapter)).merge_and_unload().state_dict()
    read, seen = forms.merged(forms.dequantized), 0
    for name in forms.touched:
        assert torch.equal(read(name), wanted[name]), name
        seen += not torch.equal(read(name), forms.merged(forms.stored)(name))
    assert seen >= 4
