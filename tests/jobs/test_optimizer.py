"""bitsandbytes' optimizers as the job holds them: pages that survive a resume, and no waits where no pages are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from studio.jobs.train import checkpoint
from studio.jobs.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from studio.jobs.train.optimizer import UnpagedAdamW8bit, build_optimizer

CARD = torch.device("meta")
"""In a card's place: bitsandbytes takes it for one, and what lies there is not on the host."""
LARGE, SMALL = (400, 300), (64, 80)
"""Above the 100 000 elements from which bitsandbytes pages a state, and below."""


class Pages:
    """Unified memory as bitsandbytes asks for it, strictly: of a card, filled before it is used."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.prefetched: list[int] = []

    def get_paged(self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CARD) -> Tensor:
        assert device == CARD
        page = torch.full(shape, 77, dtype=dtype)
        cast(Any, page).is_paged, cast(Any, page).page_deviceid = True, device.index
        self.made.append(page)
        return page

    def fill(self, page: Any, value: float) -> None:
        assert page.is_paged
        page.fill_(value)

    def prefetch_tensor(self, page: Any) -> None:
        assert page.is_paged
        self.prefetched.append(id(page))


class NothingLarge(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses whatever puts a large tensor on the card, if only for a moment."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            assert not (isinstance(leaf, Tensor) and leaf.device == CARD and leaf.numel() >= 100_000), func
        return out


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pages]:
    """The library's own paging functions, with host memory in place of CUDA's."""
    found = Pages()
    for name in ("get_paged", "fill", "prefetch_tensor"):
        monkeypatch.setattr(bnb.functional, name, getattr(found, name))
    manager = bnb.functional.GlobalPageManager.get_instance()
    before = list(manager.paged_tensors)
    yield found
    manager.paged_tensors[:] = before


def built(kind: Any, device: torch.device) -> tuple[list[nn.Parameter], Any]:
    torch.manual_seed(0)
    named = [(name, nn.Parameter(torch.randn(shape).to(device))) for name, shape in (("a", LARGE), ("b", SMALL))]
    settings: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.01, "warn": print}
    return [p for _, p in named], build_optimizer(named, kind=kind, device=torch.device("cuda"), **settings)


@pytest.mark.parametrize("kind", ["paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_paged_optimizer_is_paged_again(
    kind: str, pages: Pages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, before = built(kind, torch.device("cpu"))
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    before.step()
    monkeypatch.setattr(checkpoint, "adapter_weights", lambda model: {"a": torch.zeros(1)})
    monkeypatch.setattr(checkpoint, "set_peft_model_state_dict", lambda model, weights: None)
    model: Any = None
    path = save_checkpoint(tmp_path, model, before, TrainState(1, 1, 1.0, {}), keep=1)

    (large, small), after = built(kind, CARD)
    with NothingLarge():
        load_checkpoint(path, model, after)

    state = after.state[large]
    for name in ("state1", "state2"):
        assert torch.equal(state[name], before.state[trained[0]][name])
        assert any(state[name] is page for page in pages.made), "a page as the library makes them"
        assert any(state[name] is page for page in after.page_mng.paged_tensors), "which it knows of"
    assert len(pages.made) == 2
    after.prefetch_state(large)
    assert pages.prefetched == [id(state["state1"]), id(state["state2"])]
    elsewhere = {**after.state[small], **{name: value for name, value in state.items() if name[:-1] != "state"}}
    assert all(value.device == CARD for value in elsewhere.values() if isinstance(value, Tensor))
    assert state["step"] == after.state[small]["step"] == 1


def test_without_pages_nothing_waits_for_the_card_and_every_bit_is_the_librarys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[Tensor] = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits.append)
    ours, optimizer = built("adamw_8bit", torch.device("cpu"))
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    library = bnb.optim.AdamW8bit(theirs, lr=1e-3, weight_decay=0.01)
    assert type(optimizer) is UnpagedAdamW8bit
    for number in range(4):
        torch.manual_seed(number)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours[1].grad = theirs[1].grad = None if number == 2 else ours[1].grad
        optimizer.step()
        assert not waits
        library.step()
        assert waits, "the library waits"
        waits.clear()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for name, value in library.state[other].items():
            assert bool(torch.as_tensor(optimizer.state[one][name] == value).all()), name
