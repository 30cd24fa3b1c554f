"""Whole runs on mixtures of experts in 4 bits: training, resuming, merging, auditing, and what is said of them."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig, PhimoeConfig, PreTrainedConfig

from studio.core.direct_weights import not_adapted
from studio.core.events import Planned
from studio.core.recipe import AdapterSection, Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.jobs.base.experts.pairs import open_adapter
from studio.jobs.chat.session import Session
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.between import Between
from studio.runs.chat import ChatRequest
from studio.runs.layout import ADAPTER_WEIGHTS, RunPaths
from studio.runs.log import read_events
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.conftest import Merge, Train, history_of
from tests.jobs.merge_cases import IDS, make_base, our_merge, our_steps, pefts_merge
from tests.jobs.test_audit_run import assert_figures_of_the_whole_model
from tests.jobs.test_experts import FAMILIES, SIZES, dequantised, folder_of, loaded

EXPERTS = ("q_proj", "experts")


def test_peft_renames_what_the_table_says() -> None:
    renamed = {family for family, kind in _MODEL_TO_CONVERSION_PATTERN.items() if kind == "qwen2_moe"}
    assert {"gate_proj", "up_proj", "down_proj"} < _MOE_TARGET_MODULE_MAPPING["qwen2_moe"].keys()
    for family in renamed - {"Dots3NoteTextModel", "UnlimitedOcrTextModel", "qwen3_omni_moe", "qwen3_omni_moe_thinker"}:
        assert {"gate_proj", "up_proj", "down_proj"} <= not_adapted(family).keys(), family
    for family in ("mixtral", "gpt_oss", "qwen2_moe", "granitemoe", "llama4_text", "qwen3_5_moe_text"):
        assert not {"gate_proj", "up_proj", "down_proj"} & not_adapted(family).keys(), family


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize(
    "family",
    [name if name in {"qwen3_moe", "gpt_oss"} else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_plain_peft_loads_what_our_pairs_save(tmp_path: Path, family: str, method: str) -> None:
    folder = folder_of(FAMILIES[family](), tmp_path / "base")
    base = loaded(folder, method=method)
    plain = dequantised(folder, base) if method == "qlora" else AutoModelForCausalLM.from_pretrained(folder)
    section = AdapterSection(rank=4, alpha=8, targets=("all-linear", "experts"))
    model = attach_adapter(base, section, recompute="all").train()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    ids = torch.randint(0, 256, (2, 16))
    with model.disable_adapter():
        without = model(ids).logits.detach()
    made = model(ids).logits
    made.sin().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    assert sum(".experts." in name for name in trained) == 2 * 2 * 2, "A and B beside both stacks of both layers"
    model.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(without, plain(ids).logits, atol=1e-4, rtol=1e-4)
        opened = open_adapter(loaded(folder, method=method), str(tmp_path / "adapter"), "cpu")
        torch.testing.assert_close(opened(ids).logits, made, atol=1e-5, rtol=1e-5)
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(ids).logits
        torch.testing.assert_close(theirs, made, atol=1e-4, rtol=1e-4)
        assert (made - without).abs().max() > 0.1


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", ["llama4", "phimoe"])
def test_a_router_that_is_a_linear_layer_is_left_alone(
    train: Train, recipe: Recipe, tmp_path: Path, family: str, method: str
) -> None:
    """Llama 4's and PhiMoE's routers are subclasses of nn.Linear that return a pair."""
    sizes = {**SIZES, "vocab_size": 259}
    config: PreTrainedConfig = (
        PhimoeConfig(**{name: value for name, value in sizes.items() if name != "head_dim"}, num_local_experts=4)
        if family == "phimoe"
        else Llama4TextConfig(**sizes, num_local_experts=4, intermediate_size_mlp=128, interleave_moe_layer_step=1)
    )
    base = folder_of(config, tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    paths = train(recipe.with_("model.base", str(base)).with_("method", method).with_("train.steps", 4))
    history = history_of(paths)
    assert history.failed is None, history.failed
    assert not [name for name in weights(paths) if "router" in name or ".gate." in name]


def weights(paths: RunPaths) -> dict[str, torch.Tensor]:
    return load_file(paths.adapter / "adapter_model.safetensors")


def base_of(folder: Path, family: str) -> Path:
    if family != "gpt_oss":
        return make_base(folder, family)
    config = GptOssConfig(
        **{**SIZES, "vocab_size": 259}, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    folder_of(config, folder, torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "gpt_oss"))]
)
def test_a_run_with_adapted_experts_trains_resumes_and_merges(
    train: Train, merge: Merge, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = base_of(tmp_path / "base", family)
    recipe = recipe.with_("model.base", str(base)).with_("method", "qlora").with_("adapter.targets", EXPERTS)
    recipe = recipe.with_("train.learning_rate", 2e-3).with_("train.recompute", "all").with_("eval.rows", 2)
    whole = train(recipe)
    history = history_of(whole)
    assert history.failed is None, history.failed
    assert history.train.losses[-1] < history.train.losses[0]
    (planned,) = (event for event in read_events(whole.events) if isinstance(event, Planned))
    shape = shape_from_config(json.loads((base / "config.json").read_text(encoding="utf-8")))
    estimate = estimate_vram(shape, setup_of(recipe))
    assert planned.four_bit_share == estimate.held.four_bit_share == 1
    assert planned.kept_16bit_bytes == estimate.held.kept_16bit_bytes, "the plan says what training sees"
    assert planned.trainable_parameters == estimate.trainable_parameters

    after_step = Between.after_step
    monkeypatch.setattr(Between, "after_step", lambda self, state: state.step == 2 or after_step(self, state))
    parts = train(recipe)
    monkeypatch.undo()
    train(recipe, again=parts)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name
    assert sum(".experts." in name for name in weights(whole)) == 8

    theirs, ours = pefts_merge(base, whole.adapter, tmp_path / "peft"), our_merge(our_steps(base, whole.adapter))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for onto in ("original", "dequantized"):
        paths = merge(whole.adapter, base, tmp_path / onto, onto=onto, run=str(whole.root))
        assert history_of(paths).finished is not None, history_of(paths).failed
        assert json.loads(paths.report.read_text())["closeness"]["mean_kl"] < 1e-3
    assert_merged_onto_what_training_held(base, whole, tmp_path / "dequantized")


def assert_merged_onto_what_training_held(base: Path, run: RunPaths, merged: Path) -> None:
    trained = open_adapter(loaded(base, dtype=torch.bfloat16), str(run.adapter), "cpu").eval()
    with torch.no_grad():
        wanted = trained(input_ids=IDS).logits.float()
        made = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).eval()(input_ids=IDS).logits.float()
    assert (made.log_softmax(-1) - wanted.log_softmax(-1)).abs().max() < 0.15


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_an_audit_has_the_figures_of_the_whole_mixture(
    train: Train, recipe: Recipe, tmp_path: Path, family: str
) -> None:
    base = base_of(tmp_path / "base", family)
    recipe = recipe.with_("model.base", str(base)).with_("method", "qlora").with_("model.dtype", "bf16")
    run = train(recipe.with_("adapter.targets", EXPERTS).with_("eval.rows", 2))
    assert_figures_of_the_whole_model(run, base, tmp_path / "audit")


def test_a_chat_opens_an_adapter_from_transformers_4(tmp_path: Path) -> None:
    """Its experts lie one by one, under names that peft changes while it loads them."""
    base, adapter = folder_of(FAMILIES["mixtral"](), tmp_path / "base"), tmp_path / "adapter"
    tiny_tokenizer().save_pretrained(base)
    LoraConfig(r=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM").save_pretrained(str(adapter))
    plain = AutoModelForCausalLM.from_pretrained(base)
    hidden, inner, count = plain.config.hidden_size, plain.config.intermediate_size, plain.config.num_local_experts
    tensors = {}
    for place in (f"{layer}.block_sparse_moe.experts.{expert}" for layer in range(2) for expert in range(count)):
        for name, (into, out) in {"w1": (hidden, inner), "w3": (hidden, inner), "w2": (inner, hidden)}.items():
            key = f"base_model.model.model.layers.{place}.{name}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = torch.randn(4, into), torch.randn(out, 4)
    save_file(tensors, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    Session(ChatRequest(base=str(base), adapter=str(adapter), dtype="fp32"), lambda name, fraction: None)
    ids = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        without = plain(ids).logits
        made = open_adapter(loaded(base, method="lora"), str(adapter), "cpu")(ids).logits
        wanted = PeftModel.from_pretrained(plain, str(adapter))(ids).logits
    assert (made - wanted).abs().max() < 1e-3
    assert (made - without).abs().max() > 0.1
