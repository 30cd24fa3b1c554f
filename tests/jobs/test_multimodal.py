"""Multimodal checkpoints as the hub holds them: their language model is trained, merged and served in its own class."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from studio.core.errors import BadInput, JobFailed
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.walk import Walk
from studio.jobs.base.weights.skeleton import build_clean
from studio.jobs.chat.session import Session
from studio.jobs.train import job
from studio.jobs.train.adapter import attach_adapter, save_adapter
from studio.jobs.train.served import check_names
from studio.runs.chat import ChatRequest, Piece, Sampling
from studio.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.fakes.families import FAMILIES, config_of, make_family, without_timm
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.audit_cases import examples, plain_figures, rounded, variants_of
from tests.jobs.conftest import Merge, Train, history_of

FAST = "gemma3"
"""Has all of it: a tower and a projector, tied heads, token types that it asks for in training."""

NAMES = ("gemma3", "mistral3", "qwen3_5", "qwen3_vl")
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))


def each(*slow: str) -> Any:
    """Run a test for the fast family always, and for the others with the slow tests."""
    rest = [pytest.param(name, marks=pytest.mark.slow) for name in slow or NAMES if name != FAST]
    return pytest.mark.parametrize("family", [FAST, *rest], indirect=True)


@pytest.fixture
def family(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    make_family(tmp_path / "base", request.param, dtype=torch.float32)
    return str(request.param)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PeftModel]:
    """The models that training jobs of this process have trained."""
    kept: list[PeftModel] = []
    make = job.trainable_model

    def keeping(*given: Any, **named: Any) -> Any:
        made = make(*given, **named)
        kept.append(made[0])
        return made

    monkeypatch.setattr(job, "trainable_model", keeping)
    return kept


def original(name: str, folder: Path, **options: Any) -> Any:
    """The checkpoint in the class that it names, as anyone loads it."""
    kind = getattr(transformers, FAMILIES[name].architecture)
    with without_timm():
        return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    made: Tensor = model.eval()(input_ids=IDS).logits
    return made


def in_tower(name: str) -> bool:
    return any(word in name for word in ("visual", "vision_", "projector", "audio_"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
@each()
def test_the_adapter_has_the_trained_effect_on_the_original_class(
    family: str, method: str, recipe: Recipe, train: Train, trained: list[PeftModel], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    for path, value in {"model.base": str(base), "method": method, "train.packing": "on"}.items():
        recipe = recipe.with_(path, value)
    paths = train(recipe.with_("train.recompute", "all"))
    history = history_of(paths)
    assert history.failed is None
    assert not history.warnings, "rows are packed, and the loss is the chunked one"
    assert history.planned is not None
    assert history.planned.loss_path == "chunked"
    assert history.train.losses[-1] < history.train.losses[0]
    model = trained[0]
    # Towers are not even there, no adapted module is dead, and every decoder layer is in 4 bits.
    assert not [name for name, _ in model.named_parameters() if in_tower(name)]
    assert all(bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name)
    layers = [name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")]
    assert all(".language_model.layers." in name for name in layers)
    assert bool(layers) == (method == "qlora")

    # vLLM maps `model.language_model.` to its own `language_model.model.` (`hf_to_vllm_mapper` of these classes in
    # vllm/model_executor/models), and reads names of modules better from a list than from a regular expression.
    keys = load_file(paths.adapter / ADAPTER_WEIGHTS)
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    assert isinstance(json.loads((paths.adapter / ADAPTER_CONFIG).read_text())["target_modules"], list)

    options = {}
    if method == "qlora":
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        options = {"quantization_config": four, "device_map": {"": "cpu"}}
    plain = original(family, base, **options)
    for module in plain.modules():
        # On this kind of CPU bitsandbytes would round to bf16 in evaluation mode, which no card does.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    untrained = logits(plain)
    served = PeftModel.from_pretrained(plain, str(paths.adapter))
    assert not [name for name, weight in served.named_parameters() if in_tower(name) and "lora" in name]
    wanted = logits(model.get_base_model())
    assert torch.allclose(logits(served), wanted, atol=1e-4)
    assert float((wanted - untrained).abs().max()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.layers": (1,), "adapter.rank_pattern": (("q_proj", 2),)},
        {"adapter.modules_to_save": ("norm",)},
        {"adapter.targets": ("q_proj", "lm_head"), "adapter.dora": True},
        {"adapter.init": "pissa"},
        {"train.loss": "full", "train.attention": "eager"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"], indirect=True)
def test_every_kind_of_adapter_means_the_decoder(
    family: str, changes: dict[str, Any], recipe: Recipe, train: Train, trained: list[PeftModel], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    for path, value in {"model.base": str(base), **changes}.items():
        recipe = recipe.with_(path, value)
    paths = train(recipe)
    assert history_of(paths).failed is None
    keys = load_file(paths.adapter / ADAPTER_WEIGHTS)
    assert not [key for key in keys if in_tower(key)]
    assert keys
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys")  # peft's word for tensors that are missing
        served = PeftModel.from_pretrained(original(family, base), str(paths.adapter))
    assert torch.allclose(logits(served), logits(trained[0].get_base_model()), atol=1e-4)


@each(*NAMES, "gemma4", "gemma3n", "llama4", "qwen2_5_vl")
def test_a_merge_keeps_the_whole_checkpoint(
    family: str, recipe: Recipe, train: Train, merge: Merge, trained: list[PeftModel], tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    paths = train(recipe.with_("model.base", str(base)))
    merging = merge(paths.adapter, base, out)
    history, report = history_of(merging), json.loads(merging.report.read_text())
    assert history.failed is None
    assert abs(report["closeness"]["mean_kl"]) < 1e-6
    assert report["side_by_side"][0]["separate"] == report["side_by_side"][0]["merged"]
    assert torch.allclose(logits(original(family, out)), logits(trained[0].get_base_model()), atol=1e-4)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if in_tower(name) or "mtp" in name} <= same
    adapted = [name for name in before if name.endswith("q_proj.weight") and not in_tower(name) and "mtp" not in name]
    assert adapted
    assert same.isdisjoint(adapted)
    words = json.loads((out / "config.json").read_text())
    assert words["architectures"] == [FAMILIES[family].architecture]


@pytest.mark.slow
@each("qwen3_vl")
def test_an_adapter_made_elsewhere_may_adapt_the_tower_too(family: str, merge: Merge, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    names = ["q_proj", "qkv"]
    model = get_peft_model(original(family, base), LoraConfig(target_modules=names, task_type="CAUSAL_LM"))
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_B")}
    assert any(in_tower(name) for name in adapted)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    assert history_of(merge(tmp_path / "adapter", base, out)).failed is None
    wanted, made = model.merge_and_unload().state_dict(), original(family, out).state_dict()
    assert all(torch.allclose(made[name], wanted[name], atol=1e-6) for name in wanted)


@each("mistral3", "qwen3_5", "qwen3_vl", "llama4")
def test_an_audit_walks_the_decoder_alone(family: str, tmp_path: Path) -> None:
    base, rows = tmp_path / "base", examples(30, 12, 21)
    parts, variants = variants_of(base, ["16-bit", "nf4"])
    walk = Walk(parts, variants, rows, device=torch.device("cpu"))
    assert walk.run(lambda fraction, detail: None, lambda carried: False)
    whole, four, change = original(family, base), original(family, base), rounded("nf4")
    names = {name for block in walk.carried.seen for name in block.roundings["nf4"]}
    assert names
    assert not any(in_tower(name) for name in names)
    for name in names:
        module = four.get_submodule(name)
        module.weight.data = change(name, module.weight.data)
    for name, stack in four.named_parameters():
        if ".experts." in name and stack.dim() == 3:
            stack.data = change(name, stack.data)
    found, (loss, kl, _) = walk.scores(), plain_figures(four, whole, rows)
    assert float(found["nf4"].loss.mean()) == pytest.approx(loss, rel=1e-4)
    assert float(found["nf4"].kl.mean()) == pytest.approx(kl, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_an_audit_refuses_token_embeddings_for_every_block(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    config.architectures = [FAMILIES[name].architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="has token embeddings for every block"):
        parts_of(build_clean(tmp_path))


@each()
def test_a_chat_answers_as_the_original_class(family: str, recipe: Recipe, train: Train, tmp_path: Path) -> None:
    base, asked = tmp_path / "base", [{"role": "user", "content": "one"}]
    adapter = train(recipe.with_("model.base", str(base))).adapter
    session = Session(ChatRequest(base=str(base), adapter=str(adapter), dtype="fp32"), lambda name, fraction: None)
    said: list[Any] = []
    session.answer("tuned", asked, Sampling(max_new_tokens=12), said.append, lambda: False)
    model = PeftModel.from_pretrained(original(family, base), str(adapter)).eval()
    text = session.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = session.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=257)[0, ids.shape[1] :]
    answer = "".join(event.text for event in said if isinstance(event, Piece))
    assert answer == session.tokenizer.decode(made, skip_special_tokens=True)


def test_a_chat_refuses_an_adapter_of_the_text_class(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "mistral3", dtype=torch.float32)
    adapter = train(recipe.with_("model.base", str(base))).adapter
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    renamed = {key.replace(".language_model.", "."): value for key, value in tensors.items()}
    save_file(renamed, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="does not fit this base model: 28 tensors are not in it"):
        Session(ChatRequest(base=str(base), adapter=str(adapter), dtype="fp32"), lambda name, fraction: None)


def test_an_adapter_that_fits_nothing_of_the_original_class_is_refused(tmp_path: Path) -> None:
    """Trained on the text class of the family, its keys have other names than a server knows."""
    base = make_family(tmp_path / "base", "qwen3_5", dtype=torch.float32)
    model = attach_adapter(AutoModelForCausalLM.from_pretrained(base), AdapterSection(), recompute="none")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    with pytest.raises(JobFailed, match="does not fit the class that the base's"):
        check_names(model)
    with pytest.raises(JobFailed, match="does not fit the class that the base's") as failed:
        save_adapter(model, tiny_tokenizer(), tmp_path / "adapter")
    assert failed.value.kind == "adapter_unmatched"
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("field", "value"), [("adapter.targets", ("qkv",)), ("adapter.modules_to_save", ("merger",))])
def test_what_only_a_tower_has_is_refused(
    field: str, value: tuple[str, ...], recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "base", "qwen3_vl", dtype=torch.float32)
    failed = history_of(train(recipe.with_("model.base", str(base)).with_(field, value))).failed
    assert failed is not None
    assert "which this model does not have" in failed.message
