"""Checkpoints on the host: the same bits, and fewer bytes on the device, at every depth and in every family."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from studio.core.recipe import Recipe
from studio.jobs.train.offload import offload_checkpoints
from studio.jobs.train.step_model import StepModel
from tests.fakes.live_bytes import LiveBytes
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_families import FAMILIES, SMALL, batch, model_of
from tests.jobs.test_packing import stir


class HostBytes:
    """Keeps tensors as bytes that torch knows nothing of, as a host is to a device, and logs what is asked."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.held: list[Any] = []

    def out(self, tensor: Tensor) -> Any:
        self.log.append("out")
        copy = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes(), tensor.shape, tensor.dtype
        self.held.append(copy)
        return copy

    def settle(self, host: Any) -> None:
        self.log.append(f"settle {self._index(host)}")

    def back(self, host: Any) -> Any:
        self.log.append(f"back {self._index(host)}")
        content, shape, dtype = host
        tensor = torch.empty(shape, dtype=dtype)
        tensor.view(torch.uint8).numpy()[...] = np.frombuffer(content, np.uint8).reshape(*shape[:-1], -1)
        return tensor

    def arrived(self, coming: Any) -> Tensor:
        self.log.append("arrived")
        tensor: Tensor = coming
        return tensor

    def _index(self, host: Any) -> int:
        return next(index for index, held in enumerate(self.held) if held is host)


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    step_model = StepModel(model, "chunked", nullcontext).train()
    stir(step_model)
    step_model.zero_grad()
    torch.manual_seed(3)  # OPT and GPT-2 have dropout of their own
    loss = step_model(inputs)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family: str) -> None:
    model = model_of(family)
    loss, gradients = step(model, batch())
    copies = HostBytes()
    assert offload_checkpoints(model, copies) > 0
    got_loss, got = step(model, batch())
    assert copies.log.count("out") == SMALL["num_hidden_layers"]
    assert got_loss == loss
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(got[name], gradient), name


def test_inputs_leave_after_their_copy_and_come_back_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", {"num_hidden_layers": 4})
    model = model_of("llama")
    copies = HostBytes()
    offload_checkpoints(model, copies)
    step(model, batch())
    assert copies.log == [
        *["out", "settle 0", "out", "settle 1", "out", "settle 2", "out"],
        *["back 2", "arrived", "back 1", "arrived", "back 0", "arrived"],
    ]
    copies.log.clear()
    step(model, batch())
    assert copies.log[:2] == ["out", "settle 4"], "the step before is not touched again"


@pytest.mark.parametrize("layers", [4, 8])
def test_the_device_holds_two_inputs_instead_of_one_per_layer(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    changes = {"num_hidden_layers": layers, "hidden_size": 128, "max_position_embeddings": 512}
    monkeypatch.setitem(FAMILIES, "llama", changes)
    ids = torch.randint(3, 120, (2, 256))
    one = 2 * 256 * 128 * 4
    after_forward, peaks = [], []
    for offloads in (False, True):
        model = model_of("llama")
        if offloads:
            offload_checkpoints(model, HostBytes())
        step_model = StepModel(model, "chunked", nullcontext).train()
        with LiveBytes() as storages:
            loss = step_model({"input_ids": ids, "labels": ids.clone()})
            after_forward.append(storages.live)
            loss.backward()
        peaks.append(storages.peak)
    assert after_forward[0] - after_forward[1] == (layers - 1) * one
    # Beside the last layer's backward; gradients made later move the second peak up a little.
    gradients = 4 * sum(p.numel() for p in step_model.parameters() if p.requires_grad)
    assert (layers - 2) * one - gradients <= peaks[0] - peaks[1] <= (layers - 2) * one


def test_the_embeddings_want_no_gradient() -> None:
    """transformers lets them want one for reentrant checkpoints: as many bytes as a checkpoint, which nobody reads."""
    model = model_of("llama")
    seen: list[bool] = []
    model.get_input_embeddings().register_forward_hook(lambda module, given, made: seen.append(made.requires_grad))
    step(model, batch())
    assert seen == [False]


def test_a_cpu_has_nothing_to_move(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("train.recompute", "all")
    plain, asked = (history_of(train(recipe.with_("train.offload_checkpoints", wish))) for wish in (False, True))
    assert asked.failed is None
    assert [warning.topic for warning in asked.warnings] == ["offload"]
    assert list(asked.train.losses) == list(plain.train.losses)
