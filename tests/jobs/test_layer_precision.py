"""A base of which some layers are in 8 bits, some in 4 and some in 16: its numbers, its bytes, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from studio.core.errors import BadInput
from studio.core.layer_precision import Table, precision_at
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.frozen import base_bytes, frozen_form, held_of
from studio.core.vram.setup import setup_of
from studio.jobs.base.eight_bit import EightBitLinear, dequantised, eight_bit_layer, in_eight_bits
from studio.jobs.base.load import FourBit, load_base
from studio.jobs.base.weights.dequantized import quantised_parameters, through_four_bits
from studio.jobs.measure.weightless import frozen_tensors
from studio.jobs.train.adapted_linear import AdaptedLinear, AdaptedLinear4bit, AdaptedLinear8bit
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel
from studio.jobs.train.trainable_model import precision_held
from studio.probe.models import find_base
from studio.runs.job import write_job
from tests.jobs.conftest import Train, history_of

MIXED: Table = (("layers.1.mlp.down_proj", "nf4"), ("layers.1", "16bit"), ("mlp", "int8"))
BATCH = {"input_ids": torch.arange(96).reshape(2, 48) % 200, "labels": torch.arange(96).reshape(2, 48) % 200}


def loaded(folder: Path, precision: Table, dtype: torch.dtype = torch.float32, method: str = "qlora") -> Any:
    return load_base(
        find_base(str(folder)),
        method=method,  # type: ignore[arg-type]
        dtype=dtype,
        quant=FourBit(precision=precision),
        attention="sdpa",
        device=torch.device("cpu"),
    )


def rounded(weight: Tensor, word: str) -> Tensor:
    """A weight as its form holds it, computed by itself."""
    if word == "nf4":
        return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    if word == "int8":
        largest = weight.half().abs().amax(1, keepdim=True).float()
        return (weight.half().float() * (127 / largest)).round() * (largest * (1 / 127))
    return weight


def by_hand(folder: Path, precision: Table) -> Any:
    """The base in 32 bit with each weight rounded as the table says, in plain linear layers."""
    model = loaded(folder, (), method="lora")
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = rounded(module.weight.data, precision_at(precision, name))
    return model


def step(base: Any, **section: Any) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    recipe = Recipe().with_("adapter.rank", 4)
    for name, value in section.items():
        recipe = recipe.with_(f"adapter.{name}", value)
    model = attach_adapter(base, recipe.adapter, recompute="all")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(1)
    loss = StepModel(model, "chunked", lambda: torch.autocast("cpu", enabled=False)).train()(BATCH)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("section", [{}, {"dropout": 0.2}, {"dora": True}], ids=["plain", "dropout", "dora"])
def test_losses_and_gradients_are_those_of_a_base_that_is_rounded_by_hand(tiny: Path, section: dict[str, Any]) -> None:
    loss, gradients = step(loaded(tiny, MIXED), **section)
    wanted, exact = step(by_hand(tiny, MIXED), **section)
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert loss != pytest.approx(step(loaded(tiny, ()), **section)[0], rel=1e-6), "not the same as all in 4 bits"
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-5 * float(exact[name].abs().max()))


def test_a_merge_onto_the_trained_base_rounds_each_weight_as_the_training_did(tiny: Path) -> None:
    change, base = through_four_bits(FourBit(precision=MIXED), torch.float32), loaded(tiny, (), method="lora")
    rounds = quantised_parameters(base, MIXED)
    for name, weight in base.named_parameters():
        module = name.removesuffix(".weight")
        if name in rounds:
            torch.testing.assert_close(change(name, weight.data), rounded(weight.data, precision_at(MIXED, module)))
    kept = {name for name, _ in base.named_parameters() if name.startswith("model.layers.1.self_attn")}
    assert kept.isdisjoint(rounds)
    assert "model.layers.1.mlp.down_proj.weight" in rounds


def test_each_layer_is_held_and_adapted_in_its_own_form(tiny: Path) -> None:
    base = loaded(tiny, MIXED)
    kinds = {name: type(module) for name, module in base.named_modules()}
    assert kinds["model.layers.0.mlp.up_proj"] is EightBitLinear
    assert kinds["model.layers.1.mlp.up_proj"] is nn.Linear
    assert kinds["model.layers.1.mlp.down_proj"].__name__ == kinds["model.layers.0.self_attn.q_proj"].__name__
    assert not any(parameter.requires_grad for parameter in base.parameters())
    adapted = {type(m) for m in attach_adapter(base, Recipe().adapter, recompute="none").modules()}
    assert {AdaptedLinear, AdaptedLinear4bit, AdaptedLinear8bit} <= adapted


def test_the_bytes_and_shares_are_those_of_the_plan(tiny: Path) -> None:
    base, config = loaded(tiny, MIXED, torch.bfloat16), json.loads((tiny / "config.json").read_text())
    recipe = Recipe().with_("model.precision", MIXED).with_("model.dtype", "bf16").with_("device.device", "cpu")
    shape, form = shape_from_config(config), frozen_form(setup_of(recipe).kind)
    # Position tables are made when the model runs, and counted with what the model holds.
    tables = sum(buffer.nbytes for buffer in base.buffers())
    held = sum(tensor.nbytes for tensor in {id(t): t for t in frozen_tensors(base)}.values())
    assert held - tables == base_bytes(shape, form) - shape.buffers * form.compute
    planned, found = held_of(shape, form), precision_held(base)
    assert found.four_bit_share == pytest.approx(planned.four_bit_share)
    assert found.eight_bit_share == pytest.approx(planned.eight_bit_share)
    assert found.kept_16bit_bytes == planned.kept_16bit_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_8_bit_product_rounds_the_weight_alone_and_shows_what_it_keeps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    layer = eight_bit_layer(linear, dtype)
    layer.weight, layer.bias = in_eight_bits(linear.weight.data), linear.bias
    assert isinstance(layer, Linear8bitLt), "what peft knows such a layer by"
    exact = rounded(linear.weight.data, "int8")
    assert torch.equal(dequantised(layer.weight.data, layer.weight.SCB, torch.float32), exact)
    seen: list[int] = []
    x = torch.randn(2, 5, 48, requires_grad=True)
    with saved_tensors_hooks(lambda t: (seen.append(t.data_ptr()), t)[1], lambda t: t):
        out = layer(x)
    assert {layer.weight.data.data_ptr(), layer.weight.SCB.data_ptr()} <= set(seen)
    out.sum().backward()
    assert out.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, nn.functional.linear(x, exact, linear.bias), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad, exact.sum(0).expand_as(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ((("layers.7", "16bit"),), r"layers\.7.*no module of that name"),
        ((("w2", "int8"),), "no linear layer that is rounded"),
        ((("lm_head", "int8"),), "no linear layer that is rounded"),
        ((("embed_tokens", "nf4"),), "no linear layer that is rounded"),
    ],
)
def test_names_that_mean_nothing_are_refused(tiny: Path, precision: Table, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        loaded(tiny, precision)


def test_a_prequantised_base_stays_as_its_files_have_it(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["model.layers.1", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"layers\.0\.self_attn\.q_proj in 16bit, but .* 4 bits already"):
        loaded(folder, (("layers.0", "16bit"),))
    with pytest.raises(BadInput, match=r"layers\.1\.\S+ in int8, but the base's files hold it in 16 bit"):
        loaded(folder, (("layers.1.mlp", "int8"),))


def test_a_run_holds_its_layers_as_its_recipe_says_and_goes_on_with_no_other(recipe: Recipe, train: Train) -> None:
    mixed = recipe.with_("method", "qlora").with_("model.precision", MIXED).with_("train.steps", 2)
    mixed = mixed.with_("train.checkpoint_every", 1)
    paths = train(mixed)
    history = history_of(paths)
    assert history.finished is not None, history.failed
    assert any("in 8" in warning.message for warning in history.warnings if warning.topic == "precision")
    other = mixed.with_("model.precision", (("layers.1", "16bit"),)).with_("train.steps", 3)
    write_job(paths, other)
    train(other, again=paths)
    failed = history_of(paths).failed
    assert failed is not None
    assert "model.precision: layers.1.mlp.down_proj=nf4, layers.1=16bit, mlp=int8 -> layers.1=16bit" in failed.message
