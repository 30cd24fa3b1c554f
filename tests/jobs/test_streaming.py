"""A streamed base: the same losses and gradients, to the bit, as one that stands whole in memory."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from studio.core import tiles
from studio.core.errors import BadInput, JobFailed
from studio.core.gpu_catalogue import GIB
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.base.streaming.base import loading_behind, place_rest, stream, waiting_in
from studio.jobs.base.streaming.four_bit import on_device
from studio.jobs.base.streaming.host import WaitingMemory, check_room, most_locked
from studio.jobs.base.streaming.layers import StreamedLayers
from studio.jobs.base.streaming.ring import HostQueues
from studio.jobs.base.weights.streamed import NotLent
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel, evaluating
from studio.jobs.train.streamed_proof import prove_streaming
from studio.runs.control import request, withdraw_all
from studio.runs.history import History
from tests.fakes.tiny_model import make_tiny_model, tiny_config
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_experts import FAMILIES as EXPERTS
from tests.jobs.test_experts import folder_of, loaded
from tests.jobs.test_families import FAMILIES, batch, model_of
from tests.jobs.test_packing import stir
from tests.jobs.test_resume import at_step, weights


class LateQueues(HostQueues):
    """Copies only when computation waits for them, and spoils a buffer as soon as it may be overwritten.

    A layer that is computed without waiting finds NaN, and so does whoever reads a buffer after its use.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.copies = 0

    def copy(self, buffer: Tensor, source: Tensor) -> None:
        buffer.fill_(255)  # NaN in every floating-point format
        self.waiting.append((buffer, source))
        self.copies += 1

    def computing_waits(self, mark: Any) -> None:
        for buffer, source in self.waiting:
            super().copy(buffer, source)
        self.waiting.clear()


def step(
    model: Any, inputs: dict[str, Tensor], autocast: Callable[[], Any] = nullcontext
) -> tuple[Tensor, dict[str, Tensor]]:
    step_model = StepModel(model, "chunked", autocast).train()
    stir(step_model)
    step_model.zero_grad()
    torch.manual_seed(3)
    loss = step_model(inputs)
    with evaluating(step_model):  # other layers lie in other buffers now than on the way forward
        step_model(inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(
    model: Any, numbers: Any, inputs: dict[str, Tensor] | None = None, autocast: Any = nullcontext
) -> StreamedLayers:
    inputs = batch() if inputs is None else inputs
    wanted, gradients = step(model, inputs, autocast)
    queues = LateQueues()
    streamed = StreamedLayers(model, numbers, queues)
    loss, got = step(model, inputs, autocast)
    assert queues.copies
    assert torch.equal(loss, wanted)
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(got[name], gradient), name
    return streamed


def deep(family: str) -> Any:
    """Return a model of a family with four layers: more than there are buffers."""
    four = dict.fromkeys(("num_hidden_layers", "n_layer") if family == "gpt2" else ("num_hidden_layers",), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, {**FAMILIES[family], **four})
        return model_of(family)


def llama(*, method: str = "lora", checkpointing: bool = True, tied: bool = False, **adapter: Any) -> Any:
    """Return an adapted Llama of four layers; for QLoRA every linear map of them is in 4 bits."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=4, tie_word_embeddings=tied))
    if method == "qlora":
        model = four_bit(model)
    section = AdapterSection(rank=4, alpha=8.0, **adapter)
    return attach_adapter(model.requires_grad_(False), section, recompute="all" if checkpointing else "none")


def four_bit(model: Any) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            packed, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
            made.weight, made.quant_state = weight, state
            made.support_avx512bf16_for_cpu = False
            model.set_submodule(name, made)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "falcon", "opt", "phi", "cohere"])
def test_the_same_bits_in_other_families(family: str) -> None:
    same(deep(family), range(4))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "a 4-bit base": (range(4), {"method": "qlora", "dropout": 0.3}),
    "activations are kept": ((0, 2, 3), {"checkpointing": False, "tied": True}),
}
MORE: dict[str, tuple[Any, dict[str, Any]]] = {
    "a 16-bit base": (range(4), {}),
    "three of four": ((1, 2, 3), {"method": "qlora"}),
    "one": ((2,), {"method": "qlora"}),
    "activations are kept in 4 bits": (range(4), {"method": "qlora", "checkpointing": False, "dropout": 0.3}),
    "the first layers have no adapter": (range(4), {"method": "qlora", "layers": (2, 3)}),
    "magnitudes": (range(4), {"method": "qlora", "dora": True}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_the_same_bits(case: str) -> None:
    numbers, how = (CASES | MORE)[case]
    same(llama(**how), numbers)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_same_bits_where_mlps_go_in_tiles(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_TOKENS", 8)
    same(llama(method=method, dropout=0.3), range(4))


def test_bitsandbytes_own_product_would_train_on_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the weight where checkpoints do not see it: the loss is right and the gradients are not."""
    monkeypatch.setattr("studio.jobs.base.streaming.layers.show_products", lambda layer: None)
    model = llama(method="qlora", targets=("q_proj",))  # an adapted layer saves what it reads itself
    wanted, gradients = step(model, batch())
    StreamedLayers(model, range(4), LateQueues())
    loss, got = step(model, batch())
    assert torch.equal(loss, wanted)
    assert not all(torch.equal(got[name], gradient) for name, gradient in gradients.items())


@pytest.mark.slow
def test_evaluation_and_training_in_turns_and_fresh_buffers() -> None:
    model = llama(method="qlora")
    inputs = batch()
    stir(StepModel(model, "chunked", nullcontext))
    with torch.no_grad():
        logits = model.eval()(inputs["input_ids"]).logits
    streamed = same(model, range(4), inputs)
    _, gradients = step(model, inputs)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model.eval()(inputs["input_ids"]).logits, logits)
    with streamed.fresh_buffers():
        _, fresh = step(model, inputs)
    _, again = step(model, inputs)
    for name, gradient in gradients.items():
        assert torch.equal(fresh[name], gradient), name
        assert torch.equal(again[name], gradient), name


def test_a_weight_that_is_not_lent_is_refused() -> None:
    model = llama()
    StreamedLayers(model, range(4), HostQueues())
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.shape == (128, 64)
    with pytest.raises(NotLent):
        weight.sum()


def test_what_waits_is_counted_as_an_allocator_would() -> None:
    streamed = StreamedLayers(llama(), range(4), HostQueues())
    assert streamed.buffer_bytes == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert streamed.host_bytes == 4 * streamed.buffer_bytes


def test_tokens_are_looked_up_in_main_memory() -> None:
    model = llama()
    causal = model.get_base_model()
    inputs = batch()
    loss, gradients = step(model, inputs)
    table = causal.model.embed_tokens.weight
    waiting = waiting_in(causal, 2)
    weights = dict(causal.named_parameters())
    assert waiting(
        "model.layers.1.mlp.up_proj.base_layer.weight", weights["model.layers.1.mlp.up_proj.base_layer.weight"]
    )
    for name in (
        "model.layers.0.mlp.up_proj.base_layer.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ):
        assert not waiting(name, weights[name])
    streamed = stream(model, 2, torch.device("cpu"))
    assert streamed.host_bytes == 2 * streamed.buffer_bytes
    got_loss, got = step(model, inputs)
    assert torch.equal(got_loss, loss)
    assert all(torch.equal(got[name], gradient) for name, gradient in gradients.items())
    rows = causal.model.embed_tokens(torch.tensor([[5, 5, 7]]))
    assert torch.equal(rows[0], table[[5, 5, 7]])
    with pytest.raises(NotLent):
        causal.model.embed_tokens.weight.sum()


def test_an_embedding_that_is_the_head_or_is_trained_stays() -> None:
    for model in (llama(tied=True), llama(modules_to_save=("embed_tokens",))):
        causal = model.get_base_model()
        assert not any(
            waiting_in(causal, 4)(name, parameter) for name, parameter in causal.named_parameters() if "embed" in name
        )


def test_the_proof_passes_and_a_ring_without_a_wait_fails() -> None:
    model = llama(method="qlora", dropout=0.3)
    step_model = StepModel(model, "chunked", nullcontext)
    stir(step_model)
    inputs, queues = batch(), LateQueues()
    streamed = StreamedLayers(model, range(4), queues)
    random = torch.get_rng_state()
    prove_streaming(step_model, streamed, inputs, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    usual = queues.computing_waits
    calls = iter(range(1000))
    queues.computing_waits = lambda mark: None if next(calls) == 8 else usual(mark)  # type: ignore[method-assign]
    with pytest.raises(JobFailed, match="gradients differ") as raised:
        prove_streaming(step_model, streamed, inputs, torch.device("cpu"))
    assert raised.value.kind == "streaming_wrong"


def test_how_much_may_be_page_locked() -> None:
    assert most_locked(64 * GIB, 50 * GIB, spills=False) == 48 * GIB
    assert most_locked(64 * GIB, 50 * GIB, spills=True) == 32 * GIB
    assert most_locked(64 * GIB, GIB, spills=False) == 0
    memory = WaitingMemory(0)
    assert memory.new(100).numel() == 100
    assert "0.0 of 0.0 GiB" in memory.said()
    with pytest.raises(JobFailed, match="main memory"):
        check_room(20 * GIB, 21 * GIB)
    check_room(18 * GIB, 21 * GIB)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "four", num_hidden_layers=4)


def same_run(train: Train, recipe: Recipe, *, stop_at: int = 0, monkeypatch: Any = None) -> History:
    """Train with a streamed base and with one that is not; return what the former told."""
    found = []
    for layers in ("off", 3):
        wanted = recipe.with_("model.stream", layers)
        if stop_at and layers != "off":
            at_step(monkeypatch, stop_at, lambda between: request(between.worker.paths, "stop"))
        run = train(wanted)
        if stop_at and layers != "off":
            withdraw_all(run)
            assert history_of(run).finished.outcome == "stopped"
            train(wanted, again=run)
        history = history_of(run)
        assert history.failed is None, history.failed
        evals, answers = [one.loss for one in history.evals], [one.answer for one in history.samples]
        found.append((list(history.train.losses), evals, answers, weights(run)))
    (*before, adapter), (*after, streamed_adapter) = found
    assert before == after
    assert adapter.keys() == streamed_adapter.keys()
    for name, tensor in adapter.items():
        assert torch.equal(streamed_adapter[name], tensor), name
    return history


def settings(recipe: Recipe, **changes: Any) -> Recipe:
    for path, value in changes.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    return recipe


@pytest.mark.slow
def test_a_run_learns_the_same(four_layers: Path, train: Train, recipe: Recipe) -> None:
    recipe = settings(recipe, model__base=str(four_layers), train__accumulation=2, adapter__dropout=0.2)
    recipe = settings(recipe, train__recompute="all", train__packing="on", eval__rows=1, eval__samples=1, eval__every=2)
    seen = same_run(train, settings(recipe, method="qlora", train__steps=3))
    assert [warning.topic for warning in seen.warnings if warning.topic == "streaming"] == ["streaming"]


@pytest.mark.slow
def test_a_resumed_run_learns_the_same(
    four_layers: Path, train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(recipe, model__base=str(four_layers), train__recompute=2, train__steps=4, adapter__init="pissa")
    same_run(train, settings(recipe, train__checkpoint_every=2), stop_at=2, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_pairs_are_learnt_the_same(four_layers: Path, train: Train, recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = settings(recipe, model__base=str(four_layers), train__objective="dpo", train__steps=2)
    same_run(train, settings(recipe, data__path=str(tmp_path / "pairs.jsonl"), data__format="auto"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_in_four_bits_are_streamed(family: str, tmp_path: Path) -> None:
    model = loaded(folder_of(EXPERTS[family](), tmp_path))
    section = AdapterSection(rank=4, alpha=8.0, targets=("q_proj", "experts"))
    same(attach_adapter(model, section, recompute="all"), range(2))


@pytest.mark.slow
def test_loading_leaves_behind_what_will_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card each weight goes back to main memory as it is quantised; here the way back is only counted."""
    folder = folder_of(EXPERTS["qwen3_moe"](), tmp_path)
    moved: list[torch.Size] = []

    def counted(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        moved.append(parameter.shape)
        return on_device(parameter, device)

    ids = batch()["input_ids"]
    whole = loaded(folder)
    monkeypatch.setattr("studio.jobs.base.streaming.base.on_device", counted)
    with loading_behind(waiting_in(whole, 1)):
        model = loaded(folder)
    layer = [name for name, one in model.named_parameters() if name.startswith("model.layers.1.") and one.dim() >= 2]
    assert len(moved) == len(layer) + 1  # and the embedding
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, whole.eval()(ids).logits)
    place_rest(model, waiting_in(model, 1), torch.device("cpu"))
    streamed = stream(model, 1, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, whole.eval()(ids).logits)
    assert streamed.count == 1


def test_a_model_that_is_no_stack_of_layers_is_refused() -> None:
    model = llama()
    model.get_base_model().model.layers = nn.ModuleList([*model.get_base_model().model.layers[:3]])
    with pytest.raises(BadInput, match="is no stack of decoder layers"):
        stream(model, 2, torch.device("cpu"))
