"""The families that people tune, one row each: plan, trace, LoRA, QLoRA, the adapter on its own class, the merge.

What does not hold yet is marked in `tests/jobs/family_open.py` with its reason. The marks are strict: whoever mends a
cell takes its mark away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.probe.models import find_base, refuse_untrainable
from studio.probe.shape import find_shape
from tests.fakes.families import FAMILIES, make_family
from tests.fakes.families.dense import DENSE
from tests.fakes.families.wide import make_wide
from tests.jobs.conftest import Train, history_of
from tests.jobs.family_cases import (
    Trained,
    dead_modules,
    fp32_merge,
    last_logits,
    logits_of,
    on_its_own_class,
    our_merged,
    planned,
    traced,
    traced_recipe,
)
from tests.jobs.family_open import OPEN, REFUSED
from tests.jobs.merge_cases import tensors_of

FAST = ("gemma2", "mixtral", "lfm2")
STEPS = 4
KNOWN, UNKNOWN = 0.02, 0.10
"""How far an estimate may be from the trace, relatively, for families that are known and that are not."""

NO_TRAINING = "no training yet"


@dataclass
class Table:
    """Checkpoints and trainings, each made once, when the first cell asks for it."""

    root: Path
    made: dict[Any, Any] = field(default_factory=dict)

    def folder(self, family: str) -> Path:
        """The family's checkpoint."""
        return self._once(family, lambda: make_family(self.root / family, family))

    def wide(self, family: str) -> Path:
        """The checkpoint with the widths of a real model, of which only config and headers are there."""
        return self._once((family, "wide"), lambda: make_wide(self.root / f"{family}-wide", family))

    def trained(self, family: str, method: str, recipe: Recipe, train: Train) -> Trained:
        """A finished training on it, of every module that is linear."""
        return self._once((family, method), lambda: self._train(family, method, recipe, train))

    def _train(self, family: str, method: str, recipe: Recipe, train: Train) -> Trained:
        # Every step sees all rows, so that the loss must fall.
        changes = {"method": method, "train.steps": STEPS, "train.micro_batch": 6}
        for path, value in {"model.base": str(self.folder(family)), **changes}.items():
            recipe = recipe.with_(path, value)
        with last_logits() as logits:
            paths = train(recipe)
        history = history_of(paths)
        assert history.failed is None, history.failed.message
        kept = self.root / f"{family}-{method}"
        paths.root.rename(kept)  # the test that happens to train removes its own folder
        return Trained(type(paths)(kept), history.train.losses, logits[0])

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            try:
                self.made[key] = make()
            except BaseException as error:
                self.made[key] = error
        if isinstance(self.made[key], BaseException):
            raise self.made[key]
        return self.made[key]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(tmp_path_factory.mktemp("families"))


def cells(check: str) -> list[Any]:
    """The families as parameters of a check, with their marks."""
    return list(_cells(check))


def _cells(check: str) -> Iterator[Any]:
    for family in FAMILIES:
        if (family, check) in REFUSED:
            continue
        marks = [] if family in FAST else [pytest.mark.slow]
        if why := open_cell(family, check):
            marks.append(pytest.mark.xfail(reason=why, strict=True))
        yield pytest.param(family, marks=marks)


def open_cell(family: str, check: str) -> str:
    """Why a cell does not hold yet; empty where it does."""
    row = OPEN.get(family, {})
    if check in ("effect", "merge") and "lora" in row:
        return NO_TRAINING
    return row.get(check, "")


def method_of(family: str) -> str:
    """Which method is traced: QLoRA, where more differs from family to family; of dense families every other one's."""
    if (family, "qlora") in REFUSED or (family in DENSE and list(DENSE).index(family) % 2):
        return "lora"
    return "qlora"


@pytest.mark.parametrize("family", cells("plan"))
def test_the_config_alone_gives_the_plan_of_the_folder(family: str, table: Table) -> None:
    folder = table.wide(family)
    whole, alone = find_shape(str(folder)), find_shape(str(folder / "config.json"))
    for method in ("lora", "qlora"):
        recipe = traced_recipe(folder, method)
        of_folder, of_config = planned(whole, recipe), planned(alone, recipe)
        assert of_config.expected == pytest.approx(of_folder.expected, rel=UNKNOWN if whole.doubts else KNOWN)


@pytest.mark.parametrize("family", cells("measure"))
def test_the_estimate_is_the_trace(family: str, table: Table) -> None:
    folder = table.wide(family)
    shape, recipe = find_shape(str(folder)), traced_recipe(folder, method_of(family))
    peak, estimate = traced(recipe), planned(shape, recipe)
    assert estimate.expected == pytest.approx(peak, rel=UNKNOWN if shape.doubts else KNOWN), shape.doubts
    assert estimate.low <= peak <= estimate.high


@pytest.mark.parametrize("family", cells("lora"))
def test_lora_trains_every_module(family: str, table: Table, recipe: Recipe, train: Train) -> None:
    trained = table.trained(family, "lora", recipe, train)
    assert trained.losses[-1] < trained.losses[0]
    assert dead_modules(trained.paths.adapter) == []


@pytest.mark.parametrize("family", cells("qlora"))
def test_qlora_trains_every_module(family: str, table: Table, recipe: Recipe, train: Train) -> None:
    trained = table.trained(family, "qlora", recipe, train)
    assert trained.losses[-1] < trained.losses[0]
    assert dead_modules(trained.paths.adapter) == []


@pytest.mark.parametrize(("family", "method"), REFUSED)
def test_what_a_library_cannot_do_is_refused_before_a_run_is_made(family: str, method: Any, table: Table) -> None:
    folder = table.folder(family)
    with pytest.raises(BadInput) as caught:
        refuse_untrainable(find_base(str(folder)), method)
    assert REFUSED[family, method] in str(caught.value)
    notes = estimate_vram(find_shape(str(folder)), setup_of(traced_recipe(folder, method))).notes
    assert any(REFUSED[family, method] in note for note in notes)


def test_there_are_few_refusals() -> None:
    assert len(REFUSED) <= 6


@pytest.mark.parametrize("family", cells("effect"))
def test_the_adapter_does_on_its_own_class_what_was_trained(
    family: str, table: Table, recipe: Recipe, train: Train
) -> None:
    trained = table.trained(family, "lora", recipe, train)
    there = logits_of(on_its_own_class(table.folder(family), family, trained.paths.adapter))
    assert trained.logits.effect.abs().max() > 1e-3
    torch.testing.assert_close(there.effect, trained.logits.effect, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", cells("merge"))
def test_the_merge_has_every_bit_of_an_fp32_sum(
    family: str, table: Table, recipe: Recipe, train: Train, tmp_path: Path
) -> None:
    trained, folder = table.trained(family, "lora", recipe, train), table.folder(family)
    base, ours = tensors_of(folder), our_merged(folder, trained.paths.adapter)
    theirs = fp32_merge(folder, family, trained.paths.adapter, tmp_path / "peft")
    assert ours.keys() == base.keys()  # towers and tensors that no class loads are kept, too
    changed = [key for key in base if not torch.equal(ours[key], base[key])]
    assert changed
    assert [key for key in changed if key not in theirs] == []
    assert [key for key in theirs if key in ours and not torch.equal(ours[key], theirs[key])] == []
