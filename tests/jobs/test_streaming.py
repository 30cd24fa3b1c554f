"""A streamed base: the same losses and gradients, to the bit, as one that stands whole in memory."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from studio.core.recipe import AdapterSection
from studio.jobs.base.streaming.layers import StreamedLayers
from studio.jobs.base.streaming.ring import HostQueues
from studio.jobs.base.weights.streamed import NotLent
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel, evaluating
from tests.fakes.tiny_model import tiny_config
from tests.jobs.test_families import FAMILIES, batch, model_of
from tests.jobs.test_packing import stir


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
    return attach_adapter(model.requires_grad_(False), section, grad_checkpointing=checkpointing)


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
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_in_every_family(family: str) -> None:
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


def test_bitsandbytes_own_product_would_train_on_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the weight where checkpoints do not see it: the loss is right and the gradients are not."""
    monkeypatch.setattr("studio.jobs.base.streaming.layers.show_products", lambda layer: None)
    model = llama(method="qlora")
    wanted, gradients = step(model, batch())
    StreamedLayers(model, range(4), LateQueues())
    loss, got = step(model, batch())
    assert torch.equal(loss, wanted)
    assert not all(torch.equal(got[name], gradient) for name, gradient in gradients.items())


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
