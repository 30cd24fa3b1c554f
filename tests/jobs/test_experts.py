"""Fused experts in 4 bits: loaded one at a time, multiplied in groups, against dequantised references."""

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from studio.core import experts
from studio.jobs.base.experts import product
from studio.jobs.base.experts.forms import experts_in, shape_of
from studio.jobs.base.experts.pairs import routers
from studio.jobs.base.experts.product import GroupedForward, Pair
from studio.jobs.base.experts.stacks import weights_of
from studio.jobs.base.experts.visits import groups_of
from studio.jobs.base.load import FourBit, load_base
from studio.jobs.train.adapter import target_modules
from studio.probe.models import BaseFound

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
}
DOUBLE = FourBit()
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, **FEW),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **MANY, moe_intermediate_size=32),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **MANY, moe_intermediate_size=32, shared_expert_intermediate_size=64),
    "olmoe": lambda: OlmoeConfig(**SIZES, **MANY),
    "gpt_oss": lambda: GptOssConfig(**SIZES, **FEW, layer_types=["full_attention"] * 2),
    "granitemoe": lambda: GraniteMoeConfig(**SIZES, **FEW),
    "llama4_text": lambda: Llama4TextConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=128, interleave_moe_layer_step=1
    ),
}


def folder_of(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model as the hub holds it: experts one by one where the family does so."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, quant: FourBit = DOUBLE, dtype: torch.dtype = torch.float32, method: Any = "qlora") -> Any:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return load_base(
        BaseFound("folder", str(folder), folder, values, 1),
        method=method,
        dtype=dtype,
        quant=quant,
        attention="sdpa",
        device=torch.device("cpu"),
    )


def dequantised(folder: Path, model: nn.Module) -> Any:
    """Return transformers' own model with every weight as the 4-bit model holds it."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = dict(plain.named_modules())
    for name, module, form in experts_in(model):
        for stack in form.stacks:
            parameter = getattr(module, stack)
            getattr(held[name], stack).data = weights_of(parameter, 0, shape_of(parameter)[0])
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            held[name].weight.data = module(torch.eye(module.in_features)).T - (
                0 if module.bias is None else module.bias.unsqueeze(-1)
            )
    return plain.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "form", [DOUBLE, pytest.param(FourBit("fp4", double_quant=False), marks=pytest.mark.slow)], ids=["nf4+dq", "fp4"]
)
def test_every_stack_is_packed_as_bitsandbytes_packs_it_whole(tmp_path: Path, family: str, form: FourBit) -> None:
    folder = folder_of(FAMILIES[family](), tmp_path / "base")
    model = loaded(folder, form)
    plain = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_modules())
    found = list(experts_in(model))
    assert len(found) == 2
    for name, module, shape in found:
        assert isinstance(module.forward, GroupedForward)
        for stack in shape.stacks:
            held, weights = getattr(module, stack), getattr(plain[name], stack)
            packed, state = quantize_4bit(weights, quant_type=form.quant_type, compress_statistics=form.double_quant)
            assert torch.equal(packed, held.data)
            assert torch.equal(state.absmax, held.quant_state.absmax)
            error = (weights_of(held, 1, 3) - weights[1:3]).abs().max()
            assert error < 0.2 * weights.abs().max(), "what comes back is the weights, rounded"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "bound",
    [
        pytest.param(1, marks=pytest.mark.slow, id="one"),
        pytest.param(3 * 4 * 64 * 128 * 2, id="some"),
        pytest.param(1 << 30, marks=pytest.mark.slow, id="all"),
    ],
)
def test_logits_and_gradients_are_those_of_dequantised_experts(
    tmp_path: Path, family: str, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "EXPERT_GROUP_BYTES", bound)
    folder = folder_of(FAMILIES[family](), tmp_path / "base")
    model = loaded(folder)
    plain = dequantised(folder, model)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    into = model.get_input_embeddings()(ids).detach()
    gradients = []
    for each in (model, plain):
        given = into.clone().requires_grad_()
        logits = each(inputs_embeds=given).logits
        logits.sin().sum().backward()
        gradients.append((logits.detach(), given.grad))
    (made, of_made), (wanted, of_wanted) = gradients
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of_made, of_wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "one by one"])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_pairs_and_their_gradients_are_those_of_merged_weights(
    tmp_path: Path, family: str, grouped: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not grouped:
        monkeypatch.setattr(product, "has_grouped_product", lambda left, right: False)
    monkeypatch.setattr(experts, "EXPERT_GROUP_BYTES", 2 * 4 * 2 * 128 * 64)
    model = loaded(folder_of(FAMILIES[family](), tmp_path / "base"), method=method)
    _, module, form = next(iter(experts_in(model)))
    torch.manual_seed(2)
    pairs, merged = {}, {}
    for name in form.stacks:
        count, first, second = shape_of(getattr(module, name))
        inputs, outputs = (first, second) if form.transposed else (second, first)
        pair = Pair(torch.randn(count, 4, inputs) * 0.1, torch.randn(count, outputs, 4) * 0.1, 0.5)
        pairs[name] = pair
        merged[name] = weights_of(getattr(module, name), 0, count)
    tokens = 20
    x = torch.randn(tokens, 64)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])  # the last expert is never chosen
    weights = torch.rand(tokens, 2)
    if not form.routes:
        x = x.repeat(4, 1) * (torch.rand(80, 1) < 0.4)

    def run(through: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        factors = {
            name: (pair.into.clone().requires_grad_(), pair.back.clone().requires_grad_())
            for name, pair in pairs.items()
        }
        leaves += [factor for both in factors.values() for factor in both]
        out = through(leaves[0], leaves[1], factors)
        out.sin().sum().backward()
        return [out.detach(), *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)]

    def ours(given: Tensor, shares: Tensor, factors: Any) -> Tensor:
        beside = {name: Pair(*both, 0.5) for name, both in factors.items()}
        forward = GroupedForward(module, form, beside)
        return forward(given, chosen, shares) if form.routes else forward(given)

    def reference(given: Tensor, shares: Tensor, factors: Any) -> Tensor:
        module.__dict__.pop("forward", None)
        weight = {}
        for name, (into, back) in factors.items():
            delta = 0.5 * back @ into
            weight[name] = merged[name] + (delta.transpose(1, 2) if form.transposed else delta)
        if not form.routes:
            wide = torch.bmm(given.view(4, -1, 64), weight[form.up])
            gate, up = wide.chunk(2, dim=-1)
            return torch.bmm(up * module.act_fn(gate), weight[form.down]).view(-1, 64)
        out = torch.zeros_like(given)
        for token in range(tokens):
            for place in range(2):
                expert = int(chosen[token, place])
                held = {name: w[expert] if form.transposed else w[expert].T for name, w in weight.items()}
                bias = {name: getattr(module, f"{name}_bias")[expert] if form.biased else 0 for name in form.stacks}
                wide = module._apply_gate(given[token] @ held[form.up] + bias[form.up])
                answer = wide @ held[form.down] + bias[form.down]
                out = out.index_add(0, torch.tensor([token]), (answer * shares[token, place]).unsqueeze(0))
        return out

    for made, wanted in zip(run(ours), run(reference), strict=True):
        torch.testing.assert_close(made, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("rows", [[0, 0, 3], [2, 0, 1, 1, 1], [1] * 7, [5], [0, 4, 0, 0, 1, 2]])
@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_groups_hold_every_row_once_and_no_expert_without_rows(rows: list[int], most: int) -> None:
    seen = [0] * len(rows)
    before = 0
    for group in groups_of(rows, most):
        assert group.begin == before
        before += group.ends[-1]
        for place, (start, stop) in enumerate(zip((0, *group.ends), group.ends, strict=False)):
            seen[group.first + place] += stop - start
        if most:
            assert len(group.ends) <= most
            assert all(rows[group.first : group.stop])
    assert seen == rows


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are alive, and their peak.

    What is only mapped from a file, as safetensors does on a CPU, is no memory that was taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if id(storage) not in self._known and id(storage) not in given:
                    size = storage.nbytes()
                    self.now += size
                    key = id(storage)
                    self._known[key] = weakref.ref(storage, lambda _, k=key, s=size: self._gone(k, s))  # type: ignore[misc]
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._known.pop(key, None)


@pytest.fixture(name="wide")
def fixture_wide() -> Iterator[dict[str, Any]]:
    yield {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "family",
    [*("mixtral", "gpt_oss"), *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "granitemoe"))],
)
def test_loading_never_takes_more_than_the_model_and_one_stack(
    tmp_path: Path, family: str, wide: dict[str, Any]
) -> None:
    configs: dict[str, PretrainedConfig] = {
        "mixtral": MixtralConfig(**{**wide, "num_local_experts": 8}),
        "qwen3_moe": Qwen3MoeConfig(**wide, num_experts=16, moe_intermediate_size=256),
        "gpt_oss": GptOssConfig(**{**wide, "num_local_experts": 8}, layer_types=["full_attention"] * 2),
        "granitemoe": GraniteMoeConfig(**{**wide, "num_local_experts": 8}),
    }
    folder = folder_of(configs[family], tmp_path / "base", torch.bfloat16)
    with Live() as live:
        model = loaded(folder, dtype=torch.bfloat16)
    _, module, form = next(iter(experts_in(model)))
    stack = max(2 * shape_of(getattr(module, name)).numel() for name in form.stacks)
    finished = sum(parameter.nbytes for parameter in model.parameters())  # a lower bound: it leaves the scales out
    assert stack > finished / 4, "a stack in 16 bit would be seen"
    assert live.now > finished / 2, "what was made is counted"
    assert live.peak <= finished + stack / 2, "experts are read one by one, also where they lie in one tensor"


def test_modules_that_are_skipped_stay_in_sixteen_bits(tmp_path: Path) -> None:
    folder = folder_of(FAMILIES["mixtral"](), tmp_path / "base")
    model = loaded(
        folder, FourBit(precision=(("model.layers.0", "16bit"), ("experts.down_proj", "16bit"))), dtype=torch.bfloat16
    )
    first, second = (module for _, module, _ in experts_in(model))
    assert [first.gate_up_proj.dtype, first.down_proj.dtype] == [torch.bfloat16] * 2
    assert [second.gate_up_proj.dtype, second.down_proj.dtype] == [torch.uint8, torch.bfloat16]
    stored = load_file(folder / "model.safetensors")
    names = ("w1", "w3")
    kept = torch.cat([stored[f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"] for name in names])
    assert torch.equal(first.gate_up_proj[1], kept.to(torch.bfloat16))


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Rewrite a gpt-oss folder's experts as the hub holds them; return them in numbers, `[experts, in, out]`."""
    stored = load_file(folder / "model.safetensors")
    numbers: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = stored.pop(name).shape
        codes = torch.randint(0, 16, (count, outputs, inputs // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (count, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        stored[f"{name}_scales"] = scales
        values = FP4[codes.long()] * torch.exp2(scales.float() - 127).unsqueeze(-1)
        numbers[name] = values.reshape(count, outputs, inputs).transpose(1, 2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return numbers


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_base_in_mxfp4_is_brought_into_the_form_that_is_asked_for(tmp_path: Path, method: str) -> None:
    folder = folder_of(FAMILIES["gpt_oss"](), tmp_path / "base", torch.bfloat16)
    numbers = in_mxfp4(folder)
    model = loaded(folder, dtype=torch.bfloat16, method=method)
    for name, module, form in experts_in(model):
        for stack in form.stacks:
            wanted = numbers[f"{name}.{stack}"].to(torch.bfloat16)
            held = getattr(module, stack)
            if method == "lora":
                assert torch.equal(held, wanted)
                continue
            packed, state = quantize_4bit(wanted.contiguous(), quant_type="nf4", compress_statistics=True)
            assert torch.equal(held.data, packed)
            assert torch.equal(held.quant_state.absmax, state.absmax)
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    assert torch.isfinite(model(ids).logits).all()
    assert not hasattr(model.config, "quantization_config") or method == "qlora"


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    """Qwen3-Next-80B-A3B has 512 experts and a shared one that is 512 wide."""
    config = Qwen2MoeConfig(
        **SIZES, **MANY, moe_intermediate_size=32, shared_expert_intermediate_size=MANY["num_experts"]
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {f"model.layers.{layer}.mlp.shared_expert_gate" for layer in range(2)}
    assert set(routers(model)) == wanted
    assert "gate_proj" in target_modules(model, "all-linear", by_name=False)
