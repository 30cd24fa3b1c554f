"""Liger's loss: refused with the reason, left where a head is not its kind, and called as liger 0.8 wants to be.

Its kernels run on cards only; here a stand-in with its call computes in plain torch.
"""

import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.train import head, job
from studio.jobs.train.head import require_liger
from studio.jobs.train.step_model import StepModel
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_families import batch, model_of


class FusedLoss:
    """`LigerFusedLinearCrossEntropyLoss` in plain torch."""

    calls: list[int]

    def __init__(self, ignore_index: int = -100, reduction: str = "mean", softcap: float | None = None) -> None:
        assert reduction == "sum"
        self.softcap = softcap

    def __call__(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        assert _input.dim() == 2
        assert _input.dtype == lin_weight.dtype
        assert (target >= 0).all(), "masked tokens stay out of the head"
        FusedLoss.calls.append(len(target))
        logits = torch.nn.functional.linear(_input, lin_weight, bias).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return torch.nn.functional.cross_entropy(logits, target, reduction="sum")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[FusedLoss]:
    FusedLoss.calls = []
    module = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = FusedLoss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return FusedLoss


def result(family: str, loss: Any) -> tuple[str, Tensor, dict[str, Tensor]]:
    model = model_of(family)
    step_model = StepModel(model, loss, nullcontext)
    if loss != "full":
        assert step_model.prove(batch())
    model.train()
    torch.manual_seed(3)
    value = step_model(batch())
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return step_model.loss_path, value.detach(), gradients


@pytest.mark.parametrize(
    ("family", "path"),
    [("llama", "liger"), ("gemma2", "liger"), ("phi", "liger"), ("granite", "chunked"), ("cohere", "chunked")],
)
def test_the_same_loss_and_gradients(installed: type[FusedLoss], family: str, path: str) -> None:
    _, wanted_loss, wanted = result(family, "full")
    used, loss, got = result(family, "liger")
    assert used == path
    assert bool(installed.calls) == (path == "liger")
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-4)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def test_a_kernel_that_is_wrong_is_found_out(installed: type[FusedLoss], monkeypatch: pytest.MonkeyPatch) -> None:
    call = FusedLoss.__call__
    monkeypatch.setattr(FusedLoss, "__call__", lambda *args: call(*args) * 1.01)
    step_model = StepModel(model_of("llama"), "liger", nullcontext)
    assert not step_model.prove(batch())
    assert step_model.loss_path == "full"


def test_a_run_says_which_loss_it_took(
    train: Train, recipe: Recipe, installed: type[FusedLoss], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "require_liger", lambda device: None)
    plain = history_of(train(recipe))
    fused = history_of(train(recipe.with_("train.loss", "liger")))
    assert fused.failed is None, fused.failed
    assert fused.planned.loss_path == "liger"
    assert not fused.warnings
    assert list(fused.train.losses) == pytest.approx(list(plain.train.losses), rel=1e-5)
    trained = recipe.with_("train.loss", "liger").with_("adapter.targets", ("q_proj", "lm_head"))
    history = history_of(train(trained))
    assert history.planned.loss_path == "chunked"
    assert [warning.topic for warning in history.warnings] == ["loss"]


def test_a_cpu_is_refused_before_anything_is_loaded(train: Train, recipe: Recipe) -> None:
    failed = history_of(train(recipe.with_("train.loss", "liger").with_("model.base", "/no/such/folder"))).failed
    assert failed is not None
    assert "CUDA cards" in failed.message
    assert "chunked" in failed.message


@pytest.mark.parametrize("there", [(), ("triton",), ("liger_kernel",), ("liger_kernel", "triton")])
def test_a_card_needs_the_package(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...]) -> None:
    monkeypatch.setattr(head, "find_spec", lambda name: ModuleSpec(name, None) if name in there else None)
    if len(there) == 2:
        require_liger(torch.device("cuda"))
        return
    with pytest.raises(BadInput, match="pip install liger-kernel"):
        require_liger(torch.device("cuda"))
