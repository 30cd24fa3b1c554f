"""Adapted layers, norms and positions in few kernels: the numbers of peft and transformers, and what is launched."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from studio.core.families import OWN_NORM, OWN_ROTARY
from studio.core.kernels import launches_of
from studio.core.recipe import AdapterSection
from studio.core.shape_from_config import shape_from_config
from studio.core.trainable import target_names
from studio.core.vram.setup import Setup
from studio.jobs.base.model_class import model_class
from studio.jobs.train import adapter, fused_forms
from studio.jobs.train.adapted_linear import AdaptedLinear, AdaptedLinear4bit, held_tensors, join_products
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel
from tests.bench.bench_launches import PASSES, of_a_layer
from tests.core.published_speed import model
from tests.core.test_vram_real_step import four_bit
from tests.fakes.families import FAMILIES, config_of

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
BATCH = {"input_ids": torch.arange(96).reshape(2, 48) % 256, "labels": torch.arange(96).reshape(2, 48) % 256}


class Pair(nn.Module):
    """One linear layer, for peft."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        return self.proj(x)


def adapted(**fields: Any) -> Any:
    """A linear layer with a pair beside it whose B is not 0, in fp64."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["proj"], **fields)
    model = get_peft_model(Pair(), config).double()  # type: ignore[arg-type]
    nn.init.normal_(model.base_model.model.proj.lora_B["default"].weight)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_the_gradients_are_those_of_the_formula(rslora: bool) -> None:
    model = join_products(adapted(use_rslora=rslora))
    layer = model.base_model.model.proj
    assert type(layer) is AdaptedLinear
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    def run(x: Tensor, into: Tensor, back: Tensor) -> Any:
        return torch.func.functional_call(layer, {"lora_A.default.weight": into, "lora_B.default.weight": back}, (x,))

    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    given = (x, *(factor.detach().requires_grad_() for factor in factors))
    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}, {"use_dora": True}])
def test_it_is_pefts_own_layer_to_rounding(fields: dict[str, Any]) -> None:
    results = []
    for change in (lambda model: model, join_products):
        model = change(adapted(**fields))
        x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        model(x).square().sum().backward()
        with torch.no_grad(), model.disable_adapter():
            switched_off = model(x)
        results.append([x.grad, switched_off, *(p.grad for p in model.parameters() if p.requires_grad)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def trained(make: Callable[[], nn.Module], method: str, dtype: torch.dtype, *, fused: bool, **section: Any) -> Any:
    """Return the loss and the gradients of a tiny model's adapter, by our functions or as the libraries have it."""
    torch.manual_seed(0)
    base = make().to(dtype)
    if method == "nf4":
        four_bit(base, dtype)
    base.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(adapter, "join_products", lambda model: model)
            patch.setattr(adapter, "fuse_forms", lambda model: None)
        model = attach_adapter(base, AdapterSection(rank=4, alpha=8, **section), recompute="all")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)

    def autocast() -> Any:
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)

    step = StepModel(model, "chunked", autocast).train()
    torch.manual_seed(1)
    loss = step(BATCH)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, model


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


@pytest.mark.parametrize(("make", "method", "section"), [
    (llama, "lora", {}), (llama, "nf4", {"dropout": 0.1}), (qwen, "lora", {"rslora": True}), (qwen, "nf4", {}),
])  # fmt: skip
def test_a_step_is_the_libraries_own_in_fp32(make: Any, method: str, section: dict[str, Any]) -> None:
    theirs, ours = (trained(make, method, torch.float32, fused=fused, **section) for fused in (False, True))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("method", ["lora", "nf4"])
def test_a_step_in_16_bits_is_nearer_to_fp32_or_as_near(method: str) -> None:
    """Rounded less often: what peft and transformers round in between is added and turned in fp32 here."""
    exact = trained(llama, method, torch.float32, fused=False)
    off = []
    for fused in (False, True):
        found = trained(llama, method, torch.bfloat16, fused=fused)
        assert found[0] == pytest.approx(exact[0], rel=2e-3)
        off.append(sum(float((found[1][n] - g).norm() / g.norm()) for n, g in exact[1].items()) / len(exact[1]))
    assert off[1] <= off[0] * 1.05


def test_what_the_backward_reads_of_a_4_bit_weight_can_be_seen() -> None:
    """bitsandbytes keeps it on its context, where no checkpoint looks when buffers are filled anew."""
    _, _, model = trained(llama, "nf4", torch.bfloat16, fused=True)
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear4bit))
    held = held_tensors(layer.base_layer.weight)
    assert len(held) == 6  # the packed weight, its scales, their offset and their own scales, and two tables
    seen: list[int] = []
    with saved_tensors_hooks(lambda t: (seen.append(t.untyped_storage().data_ptr()), t)[1], lambda t: t):
        layer(torch.randn(1, 3, 128, dtype=torch.bfloat16, requires_grad=True))
    assert {t.untyped_storage().data_ptr() for t in held} <= set(seen)


def test_the_backward_reads_what_was_saved_and_not_what_the_layer_holds_by_then() -> None:
    _, _, model = trained(llama, "nf4", torch.bfloat16, fused=True)
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear4bit))
    results = []
    for refilled in (False, True):
        held = held_tensors(layer.base_layer.weight)
        kept = [t.clone() for t in held]
        copies = {t.untyped_storage().data_ptr(): copy for t, copy in zip(held, kept, strict=True)}
        x = torch.ones(1, 3, 128, dtype=torch.bfloat16, requires_grad=True)
        with saved_tensors_hooks(lambda t, copies=copies: copies.get(t.untyped_storage().data_ptr(), t), lambda t: t):
            made = layer(x)
        if refilled:
            for tensor in held:
                tensor.zero_()
        made.sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)
    assert results[0].abs().sum() > 0


@pytest.mark.slow
def test_families_whose_code_is_their_own_are_known() -> None:
    """The estimate goes by the family's name, the engine by its code: both must say the same."""
    for name in FAMILIES:
        config = config_of(name)
        picked = model_class(config)
        with torch.device("meta"):
            model = picked.text_kind()._from_config(picked.config)
        shape = shape_from_config({**picked.config.to_dict(), "model_type": picked.config.model_type})
        layers = [group.layer for group in shape.groups]
        fuses = any(
            fused_forms._same_code(type(m).forward, fused_forms.llama.LlamaRMSNorm.forward) for m in model.modules()
        )
        assert fuses == (layers[0].norm == "rms" and shape.family not in OWN_NORM), name
        turns = any(map(fused_forms._rotates_as_llama, model.modules()))
        whole = any(
            one.rotary == 1 and one.rotary_form == "halves" and not (one.rotary_joined or one.rotary_wide or one.latent)
            for one in layers
        )
        if whole:
            assert turns == (shape.family not in OWN_ROTARY), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most", "times"),
    [
        ({"method": "lora", "seq_len": 2048}, (41, 40, 63), 0),
        ({"method": "qlora", "seq_len": 2048}, (62, 61, 84), 3),
        ({"method": "qlora", "seq_len": 2048, "keep_dequantised": True}, (62, 61, 63), 2),
    ],
)
def test_a_layer_launches_no_more_than_before(settings: dict[str, Any], most: tuple[int, int, int], times: int) -> None:
    """peft's and transformers' own operators are 80, 76 and 124 for LoRA, 108, 104 and 145 for QLoRA."""
    found, dequantised = of_a_layer("Llama-3.1-8B", settings)
    assert dequantised == 7 * times
    assert all(found[name].total() <= limit for name, limit in zip(PASSES, most, strict=True))
    shape = model("Llama-3.1-8B")
    setup = Setup(**settings)
    counted = launches_of(shape, setup, target_names(shape, setup.targets)) / shape.layers
    assert counted == pytest.approx(sum(found[name].total() for name in PASSES), rel=0.05), "core/kernels.py"
