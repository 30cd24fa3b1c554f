"""Weights that a model's code reads past their module: all are known, none is adapted, and none is read in 4 bits."""

import ast
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from studio.core.direct_weights import kept_16bit, read_past
from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.trainable import target_names
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup
from studio.jobs.base.load import FourBit, load_base
from studio.probe.models import find_base
from tests.jobs.conftest import Train, history_of
from tests.jobs.hybrid_cases import config_of, make_hybrid

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 259,
}  # fmt: skip
MODELS = Path(transformers.__file__).parent / "models"
ELSEWHERE = {
    "bloom": "only with `slow_but_exact`, which splits the product over the cards that it was pretrained on",
    "reformer": "attends by hashing; its class is none that is loaded for training here",
}


def read_directly(module: ast.Module) -> Iterator[str]:
    """Yield the linear maps whose weight a method reads, other than to ask for its format or place."""
    for kind in [node for node in ast.walk(module) if isinstance(node, ast.ClassDef)]:
        linears = {
            node.targets[0].attr
            for node in ast.walk(kind)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
            if ast.unparse(node.value.func) == "nn.Linear" and isinstance(node.targets[0], ast.Attribute)
        }
        for method in [node for node in kind.body if isinstance(node, ast.FunctionDef) and "init" not in node.name]:
            asked = {
                id(node.value)
                for node in ast.walk(method)
                if isinstance(node, ast.Attribute) and node.attr in {"dtype", "device", "shape"}
            }
            asked |= {
                id(node.args[0])
                for node in ast.walk(method)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
            }
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked:
                    owner = ast.unparse(node.value).removeprefix("self.")
                    if owner in linears - {"lm_head"}:
                        yield owner


def test_the_table_holds_what_transformers_reads_past_its_modules() -> None:
    seen = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        family, text = path.parent.name, path.read_text()
        # Reading the syntax takes long, so only of files that name such a weight at all.
        linears = set(re.findall(r"self\.(\w+) = nn\.Linear\(", text)) - {"lm_head"}
        candidate = "ForCausalLM" in text and family not in ELSEWHERE
        if candidate and linears & set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", text)):
            names = set(read_directly(ast.parse(text)))
            seen |= {family: names} if names else {}
    assert seen == {family: {*read_past(family), *kept_16bit(family)} for family in seen}
    assert {"mamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "jamba"} <= seen.keys()


@pytest.mark.parametrize(
    ("family", "name"),
    [("falcon_h1", "out_proj"), ("granitemoehybrid", "out_proj"), ("mamba", "x_proj"), ("jamba", "dt_proj")],
)
def test_a_target_without_effect_is_refused_with_the_reason(
    train: Train, recipe: Recipe, tmp_path: Path, family: str, name: str
) -> None:
    recipe = recipe.with_("model.base", str(make_hybrid(tmp_path / family, family)))
    failed = history_of(train(recipe.with_("adapter.targets", (name,)))).failed
    assert failed is not None
    assert failed.failure == "dead_targets"
    assert "past the adapter" in failed.message
    assert "in_proj" in failed.advice
    assert name not in failed.advice


def test_a_convolution_as_a_target_is_refused_with_the_reason(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_("model.base", str(make_hybrid(tmp_path / "qwen3_5_text", "qwen3_5_text")))
    failed = history_of(train(recipe.with_("adapter.targets", ("q_proj", "conv1d")))).failed
    assert failed is not None
    assert failed.failure == "dead_targets"
    assert "convolution" in failed.message


def test_the_plan_refuses_what_the_training_refuses() -> None:
    shape = shape_from_config(LLAMA | {"model_type": "jamba"})
    assert isinstance(shape, ModelShape)
    with pytest.raises(BadInput, match=r"dt_proj: this model multiplies .* past the adapter"):
        target_names(shape, ("dt_proj",))
    assert "dt_proj" not in target_names(shape, "all-linear")


def test_the_plan_says_what_all_linear_leaves_out() -> None:
    shape = shape_from_config(config_of("granitemoehybrid").to_dict())
    notes = estimate_vram(shape, Setup(method="lora")).notes
    assert sum(note.startswith("all-linear leaves out out_proj: the fused kernel") for note in notes) == 1
    assert not any("leaves out" in note for note in estimate_vram(shape, Setup(targets=("in_proj", "q_proj"))).notes)
    assert not any("leaves out" in note for note in estimate_vram(shape_from_config(LLAMA), Setup()).notes)


def fused(kind: type[nn.Module], seen: list[Any]) -> Any:
    """Stand in for the kernel of a card: it takes weights, notes them and, as on a CPU, leaves the work to torch."""

    def kernel(*given: Any, **named: Any) -> None:
        seen.extend(value for value in (*given, *named.values()) if isinstance(value, nn.Parameter))

    name = "mamba_inner_fn" if "MambaMixer" in kind.__name__ else "mamba2_split_conv1d_scan_combined"
    return name, kernel


@pytest.mark.parametrize("family", ["mamba", "mamba2", "nemotron_h"])
def test_a_fused_kernel_is_handed_no_weight_in_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = make_hybrid(tmp_path / family, family)
    ids = torch.arange(3, 30)[None]
    for method in ("lora", "qlora"):
        model = load_base(
            find_base(str(folder)), method=method, dtype=torch.float32, quant=FourBit(), attention="eager",
            device=torch.device("cpu"),
        )  # fmt: skip
        mixer = next(module for module in model.modules() if type(module).__name__.endswith("Mixer"))
        seen: list[Any] = []
        name, kernel = fused(type(mixer), seen)
        monkeypatch.setitem(inspect.unwrap(type(mixer).forward).__globals__, name, kernel)
        model.train()
        model(input_ids=ids, use_cache=False)
        assert bool(seen) is (method == "lora")
        assert not any(hasattr(weight, "quant_state") for weight in seen)
        quantised = {name.split(".")[-2] for name, p in model.named_parameters() if hasattr(p, "quant_state")}
        assert bool(quantised) is (method == "qlora")
        assert not quantised & kept_16bit(family)
        assert all(child.training for child in mixer.children())


def test_a_4_bit_model_computes_with_its_dequantised_weights(tmp_path: Path) -> None:
    """In training mode as in evaluation mode, wherever the model's code reads a weight."""
    folder = make_hybrid(tmp_path / "mamba", "mamba")
    exact = AutoModelForCausalLM.from_pretrained(folder)
    model = load_base(
        find_base(str(folder)), method="qlora", dtype=torch.float32, quant=FourBit(), attention="eager",
        device=torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (state := getattr(parameter, "quant_state", None)) is not None:
                exact.get_parameter(name).copy_(dequantize_4bit(parameter.data, state))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted = exact(input_ids=ids).logits
        trained = model.train()(input_ids=ids, use_cache=False).logits
        evaluated = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(trained, wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(evaluated, wanted, rtol=1e-4, atol=1e-3)


def quantised_by_its_author(folder: Path, family: str, **bits: bool) -> Path:
    """Write a base of which bitsandbytes has quantised all linear layers but the head, as transformers has it do."""
    whole = make_hybrid(folder / "whole", family, dtype=torch.bfloat16)
    quantised = BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=quantised, device_map={"": "cpu"})
    shutil.copytree(whole, folder / "made", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "made")
    return folder / "made"


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_quantised_by_its_author_goes_without_the_fused_kernel_too(tmp_path: Path, bits: str) -> None:
    folder = quantised_by_its_author(tmp_path, "mamba2", **{bits: True})
    model = load_base(
        find_base(str(folder)), method="qlora", dtype=torch.bfloat16, quant=FourBit(), attention="eager",
        device=torch.device("cpu"),
    ).train()  # fmt: skip
    mixers = [module for module in model.modules() if type(module).__name__ == "Mamba2Mixer"]
    assert [mixer.training for mixer in mixers] == [False, False]
    assert all(mixer.in_proj.training for mixer in mixers)


def test_a_base_whose_files_hold_a_weight_in_4_bits_that_is_read_as_numbers_is_refused(
    train: Train, recipe: Recipe, tmp_path: Path
) -> None:
    folder = quantised_by_its_author(tmp_path, "mamba", load_in_4bit=True)
    failed = history_of(train(recipe.with_("model.base", str(folder)).with_("method", "qlora"))).failed
    assert failed is not None
    assert "dt_proj are quantised, and a mamba model multiplies" in failed.message
    assert "original 16-bit model" in failed.message
