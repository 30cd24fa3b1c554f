"""MLPs in tiles: the same numbers as whole, nothing computed twice, and as much memory as the estimate says."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core import tiles as size_of_tiles
from studio.core.measured import height
from studio.core.recipe import AdapterSection
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.loop import layer_traits
from studio.core.vram.setup import Setup
from studio.core.vram.tape import Tape
from studio.core.vram.tiles import takes_tiles
from studio.jobs.base.head_groups import attention_by_groups, by_groups
from studio.jobs.base.model_class import decoder_layers
from studio.jobs.base.sinks import KernelCall
from studio.jobs.measure.fake import fake_world
from studio.jobs.measure.trace import Target, trace
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.tiles import dense_mlp
from tests.bench.trace_settings import config_of, estimated_peak, recipe_of
from tests.fakes.families import FAMILIES, without_timm
from tests.fakes.families import config_of as family_config

TILE, TOKENS = 256, 1024
LLAMA = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(size_of_tiles, "TILE_TOKENS", TILE)
    monkeypatch.setattr(torch.backends.mkldnn, "deterministic", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the number of rows
    yield
    torch.set_num_threads(threads)


def model(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA)).to(dtype)
    adapted = attach_adapter(base, AdapterSection(rank=8, dropout=dropout), recompute="all").train()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    return adapted


def whole(adapted: Any) -> Any:
    for _, layer in decoder_layers(adapted.get_base_model()):
        del layer.mlp.forward
    return adapted


def step(adapted: Any, seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the logits, the gradient of the embedded input, and the adapter's gradients."""
    given = rows_of(adapted).requires_grad_()
    torch.manual_seed(seed)
    logits = adapted(inputs_embeds=given).logits
    loss_of(logits).backward()
    assert given.grad is not None
    return logits.detach(), given.grad, {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


def rows_of(adapted: Any) -> Tensor:
    ids = torch.randint(0, 128, (2, TOKENS // 2), generator=torch.Generator().manual_seed(3))
    return adapted.get_input_embeddings()(ids).detach()


def loss_of(logits: Tensor) -> Tensor:
    """A loss in the model's own format; transformers' is always fp32."""
    return -logits.log_softmax(-1)[..., 7].mean()


def test_the_same_numbers_as_whole() -> None:
    logits, into, gradients = step(model())
    wanted, wanted_into, wanted_gradients = step(whole(model()))
    exact = step(whole(model()).double())[2]
    assert torch.equal(logits, wanted)
    assert torch.equal(into, wanted_into)
    assert gradients.keys() == wanted_gradients.keys() == exact.keys()

    def off(found: dict[str, Tensor]) -> float:
        return max(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

    assert off(gradients) < 1.1 * off(wanted_gradients) < 1e-5, "sums in fp32 lose nothing more"


def test_nothing_is_computed_twice() -> None:
    seen: dict[str, int] = {}
    for name, adapted in (("tiles", model()), ("whole", whole(model()))):
        rows: list[int] = []
        down = adapted.get_base_model().model.layers[1].mlp.down_proj.base_layer
        down.register_forward_hook(lambda module, given, made, rows=rows: rows.append(given[0].shape[:-1].numel()))
        step(adapted)
        seen[name] = sum(rows)
        assert max(rows) == (TILE if name == "tiles" else TOKENS)
    assert seen == {"tiles": 2 * TOKENS, "whole": 2 * TOKENS}, "once forward, once again on the way back"


def test_the_gradient_heeds_what_was_dropped() -> None:
    adapted = model(torch.float64, dropout=0.3).double()
    gradients = step(adapted)[2]
    name, weight = next((n, p) for n, p in adapted.named_parameters() if "layers.0.mlp.up_proj.lora_A" in n)
    direction = torch.randn_like(weight)
    losses = []
    for sign in (1, -1):
        weight.data += sign * 1e-5 * direction
        torch.manual_seed(1)
        losses.append(loss_of(adapted(inputs_embeds=rows_of(adapted)).logits).item())
        weight.data -= sign * 1e-5 * direction
    slope = float((gradients[name] * direction).sum())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


def test_short_rows_and_uncheckpointed_layers_are_taken_whole() -> None:
    adapted = model()
    layer = adapted.get_base_model().model.layers[0]
    rows: list[int] = []
    layer.mlp.down_proj.register_forward_hook(lambda module, given, made: rows.append(given[0].shape[1]))
    adapted(input_ids=torch.zeros(1, TILE, dtype=torch.long))
    layer.gradient_checkpointing = False
    adapted(input_ids=torch.zeros(1, 2 * TILE, dtype=torch.long))
    assert rows == [TILE, 2 * TILE]
    with torch.no_grad():
        adapted.eval()(input_ids=torch.zeros(1, 2 * TILE, dtype=torch.long))
    assert rows[2:] == [TILE, TILE], "an evaluation keeps nothing, and is taken in tiles"


@pytest.mark.parametrize(("heads", "keys", "groups"), [(8, 4, 4), (6, 6, 6), (7, 1, 1), (22, 11, 1), (24, 12, 6)])
def test_heads_in_groups_give_the_same_bits(
    heads: int, keys: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert size_of_tiles.head_groups(keys) == groups
    results, calls = [], []
    forward = KernelCall.forward
    monkeypatch.setattr(KernelCall, "forward", lambda *given: calls.append(1) or forward(*given))
    for longest in (40, 41):  # in rows of 41 tokens
        monkeypatch.setattr(size_of_tiles, "GROUPED_FROM_TOKENS", longest)
        torch.manual_seed(0)
        inputs = [torch.randn(2, 41, count, 16).transpose(1, 2).requires_grad_() for count in (heads, keys, keys)]
        layer = torch.nn.Module()
        layer.num_key_value_groups = heads // keys
        out, _ = attention_by_groups(layer, *inputs, None, scaling=0.3)
        assert out.shape == (2, 41, heads, 16)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert len(calls) == (groups if groups > 1 else 0)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_packed_rows_take_heads_in_groups_too() -> None:
    """On fake tensors: the flash kernel has not run here."""
    with fake_world():
        inputs = [torch.empty(50, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4, 4)]
        call = KernelCall("flash", 0.25, causal=True, longest=30)
        out = by_groups(inputs, call, 4, torch.empty(3, dtype=torch.int32))
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert [one.shape for one in (out, *gradients)] == [inputs[0].shape, *(one.shape for one in inputs)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama-3.2-1B", {"method": "qlora", "seq_len": 1500, "rank": 32}),
        ("Llama-3.2-1B", {"method": "lora", "seq_len": 700, "micro_batch": 2, "accumulation": 2, "dropout": 0.1}),
        ("gemma-2b", {"method": "lora", "seq_len": 1024, "targets": ("up_proj", "down_proj")}),
        ("Llama-3.2-1B", {"method": "lora", "seq_len": 2048, "recompute": "none"}),
        ("Qwen3-4B", {"method": "qlora", "seq_len": 2046}),
    ],
)
def test_the_estimate_beside_a_trace(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(size_of_tiles, "GROUPED_FROM_TOKENS", 1100)
    recipe = recipe_of(settings)
    peaks = trace(recipe, config_of(name, 2), Target("cuda", recipe.model.dtype)).log.peaks()
    row = {"model": name, "layers": 2, "settings": settings, "peaks": peaks}
    assert estimated_peak(row) == pytest.approx(max(map(height, peaks.values())), rel=0.01)


@pytest.mark.slow
def test_every_family_takes_the_tiles_that_the_estimate_counts_on() -> None:
    with torch.device("meta"), without_timm():
        for name, family in FAMILIES.items():
            config = family_config(name)
            built = getattr(transformers, family.architecture)(config).requires_grad_(False)
            shape = shape_from_config(config.to_dict())
            run = layer_traits(shape, Setup(method="lora"), "flash").modules(Tape(), shape)
            kinds = shape.kinds if len(shape.groups) > 1 else [0] * shape.layers
            # Experts beside a dense MLP have an MLP of their own only in Gemma 4; elsewhere they stand in one module.
            layers = [shape.groups[kind].layer for kind in kinds]
            wanted = [takes_tiles(run, layer) and (not layer.experts or bool(layer.value_norm)) for layer in layers]
            assert [dense_mlp(layer) is not None for _, layer in decoder_layers(built)] == wanted, name
