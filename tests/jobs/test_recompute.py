"""`train.recompute`: which layers are computed again, and that the training is the same to the bit however many are."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from studio.core import tiles as size_of_tiles
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.base.load import _keep_packing as keep_packing
from studio.jobs.base.streaming.layers import StreamedLayers
from studio.jobs.train import adapted_linear
from studio.jobs.train.adapter import attach_adapter, checkpointed
from studio.jobs.train.between import Between
from studio.jobs.train.offload import offload_checkpoints
from studio.jobs.train.step_model import StepModel
from studio.runs.job import write_job
from studio.runs.layout import ADAPTER_WEIGHTS
from tests.core.test_vram_real_step import four_bit
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_families import FAMILIES, SMALL
from tests.jobs.test_offload import HostBytes
from tests.jobs.test_packing import stir
from tests.jobs.test_streaming import LateQueues

LAYERS = 5


def model_of(
    recompute: Any, *, family: str = "llama", method: str = "lora", keeps: bool = False, **section: Any
) -> Any:
    torch.manual_seed(1)
    sizes = {**SMALL, **FAMILIES[family], "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
    if family == "falcon":
        del sizes["head_dim"]  # a property there
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    if method == "nf4":
        four_bit(base, torch.float32)
        keep_packing(base)
    base.requires_grad_(False)
    section_of = AdapterSection(rank=4, alpha=8.0, **section)
    return attach_adapter(base, section_of, recompute=recompute, keep_dequantised=keeps)


def step(model: Any) -> tuple[float, dict[str, Tensor]]:
    step_model = StepModel(model, "chunked", nullcontext).train()
    stir(step_model)
    step_model.zero_grad()
    torch.manual_seed(3)
    ids = torch.arange(3, 63).reshape(2, 30)
    loss = step_model({"input_ids": ids, "labels": ids.clone()})
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_bits(model: Any, wanted: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradients = step(model)
    assert loss == wanted[0]
    assert gradients.keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("method", ["lora", "nf4"])
def test_losses_and_gradients_are_the_same_to_the_bit(method: str) -> None:
    wanted = step(model_of("none", method=method, dropout=0.2))
    assert len(wanted[1]) == LAYERS * 7 * 2
    for recompute in (1, 3, "all"):
        same_bits(model_of(recompute, method=method, dropout=0.2), wanted)


class Dequantised(TorchDispatchMode):
    """Counts how often a weight is dequantised: for a product, or to be kept."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("gemm_4bit", "dequantize_4bit")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["all", 2, "streamed", pytest.param("tiles", marks=pytest.mark.slow)])
def test_kept_dequantised_weights_give_the_same_bits(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_linear, "PRODUCT_BY_KERNEL", 13)  # the last tile of 60 rows is too short to keep
    if case == "tiles":
        monkeypatch.setattr(size_of_tiles, "TILE_TOKENS", 47)
    again, found = case if case == 2 else "all", []
    for keeps in (False, True):
        model = model_of(again, method="nf4", keeps=keeps, dropout=0.2)
        if case == "streamed":
            StreamedLayers(model, range(LAYERS), LateQueues())
        with Dequantised() as counted:
            found.append((step(model), counted.count))
    (wanted, three), ((loss, gradients), two) = found
    assert loss == wanted[0]
    assert all(torch.equal(gradients[name], gradient) for name, gradient in wanted[1].items())
    layers = LAYERS if again == "all" else again
    # The first layer's input wants no gradient: what three of its maps dequantise nobody needs on the way back.
    of_all, of_short_tiles = layers * 7 - 3, layers * 3 if case == "tiles" else 0
    assert three == LAYERS * 14 - 3 + layers * 7 + 3 * of_short_tiles
    assert two == three - of_all


@pytest.mark.parametrize(("dropout", "attention", "saved"), [(0.0, 0.0, 0), (0.1, 0.0, LAYERS), (0.0, 0.1, LAYERS)])
def test_random_state_is_saved_only_where_something_is_dropped(
    dropout: float, attention: float, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SMALL, "attention_dropout", attention)
    model, states = model_of("all", dropout=dropout), list[Tensor]()
    state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(state()) or states[-1])
    StepModel(model, "chunked", nullcontext).train()(
        {"input_ids": torch.arange(3, 33)[None], "labels": torch.arange(3, 33)[None]}
    )
    assert len(states) == saved


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_layers_that_can_be_left_out(family: str) -> None:
    model = model_of(2, family=family)
    assert checkpointed(model) == (2, LAYERS)
    same_bits(model, step(model_of("none", family=family)))


def test_the_first_layers_that_the_backward_reaches_are_computed_again() -> None:
    for recompute, layers, again in (
        (2, (), [0, 1]),
        (2, (2, 3), [2, 3]),
        ("all", (), [*range(LAYERS)]),
        (9, (), [*range(LAYERS)]),
    ):
        model = model_of(recompute, layers=layers)
        found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        runs = [number for number, layer in enumerate(found) if layer.gradient_checkpointing]
        assert [number for number in runs if number >= min(layers, default=0)] == again
        assert checkpointed(model) == (len(runs), LAYERS)


def test_only_inputs_of_layers_that_are_computed_again_wait_on_the_host() -> None:
    model, copies = model_of(2), HostBytes()
    wanted = step(model_of("none"))
    assert offload_checkpoints(model, copies) > 0
    same_bits(model, wanted)
    assert copies.log.count("out") == 2


def test_a_packed_accumulated_and_resumed_run_is_the_same_run(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume may compute other layers again than the run did before."""
    recipe = recipe.with_("train.packing", "on").with_("train.accumulation", 3).with_("adapter.dropout", 0.1)
    recipe = recipe.with_("train.steps", 4)
    whole = train(recipe)
    after_step = Between.after_step
    monkeypatch.setattr(Between, "after_step", lambda self, state: state.step == 2 or after_step(self, state))
    parts = train(recipe.with_("train.recompute", 1))
    monkeypatch.undo()
    write_job(parts, recipe.with_("train.recompute", "all"))
    train(recipe, again=parts)
    losses = [list(history_of(paths).train.losses) for paths in (whole, parts)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    weights = [load_file(paths.adapter / ADAPTER_WEIGHTS) for paths in (whole, parts)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
