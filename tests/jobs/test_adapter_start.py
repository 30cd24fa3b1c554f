"""A run that begins with the adapter of another: it goes on where that one ended, and only where both fit."""

import shutil
from pathlib import Path

import pytest
import torch

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.probe.adapter_folder import check_start, start_folder
from studio.probe.fingerprint import fingerprint
from studio.runs.control import request, withdraw_all
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import Merge, Train, history_of
from tests.jobs.test_resume import at_step, weights


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return recipe.with_("train.steps", 3).with_("eval.rows", 1).with_("eval.every", 1)


@pytest.fixture
def first(train: Train, recipe: Recipe) -> RunPaths:
    """The first stage."""
    return train(recipe)


def starting(recipe: Recipe, adapter: Path) -> Recipe:
    return recipe.with_("adapter.start", str(adapter))


def test_a_stage_begins_where_the_one_before_ended_and_is_merged_like_any_other(
    train: Train, merge: Merge, recipe: Recipe, first: RunPaths, tiny: Path, tmp_path: Path
) -> None:
    second = train(starting(recipe, first.adapter))
    before, after = history_of(first), history_of(second)
    assert after.evals[0].step == 0
    assert after.evals[0].loss == before.evals[-1].loss
    assert after.evals[0].loss != before.evals[0].loss
    merged = merge(second.adapter, tiny, tmp_path / "merged")
    assert run_status(merged) is Status.finished


def test_once_begun_it_needs_the_stage_before_no_longer(
    train: Train, recipe: Recipe, first: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = starting(recipe, first.adapter)
    whole = train(recipe)
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    withdraw_all(parts)
    shutil.rmtree(first.root)
    train(recipe, again=parts)
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("adapter.rank", 8, "adapter.rank: found 4, wanted 8"),
        ("adapter.alpha", 16.0, "adapter.alpha: found 8.0, wanted 16.0"),
        ("adapter.rslora", True, "adapter.rslora"),
        ("adapter.targets", ("q_proj",), "adapter.targets: found all-linear, wanted q_proj"),
        ("adapter.layers", (1,), "adapter.layers"),
    ],
)
def test_an_adapter_of_another_form_is_refused_before_the_start(
    recipe: Recipe, first: RunPaths, tiny: Path, field: str, value: object, told: str
) -> None:
    check_start(starting(recipe, first.adapter), tiny, fingerprint)
    with pytest.raises(BadInput, match=told):
        check_start(starting(recipe.with_(field, value), first.adapter), tiny, fingerprint)


def test_an_adapter_of_another_base_is_refused(recipe: Recipe, first: RunPaths, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(BadInput, match=r"trained on another base than model.base: .* hold other numbers"):
        check_start(starting(recipe, first.adapter), other, fingerprint)


def test_of_a_foreign_folder_the_tensors_are_compared(
    train: Train, recipe: Recipe, first: RunPaths, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(first.adapter, foreign)
    failed = history_of(train(starting(recipe.with_("adapter.targets", ("q_proj",)), foreign))).failed
    assert failed is not None
    assert failed.failure == "other_adapter"
    assert "wanted none" in failed.message


def test_a_run_is_meant_by_its_name_its_path_or_its_adapter(first: RunPaths, tmp_path: Path) -> None:
    (first.root / "control").mkdir(exist_ok=True)
    for word in (first.name, str(first.root), str(first.adapter)):
        assert start_folder(word, first.root.parent) == first.adapter
    with pytest.raises(BadInput, match=r"adapter\.start: found neither"):
        start_folder("nothing-of-the-kind", tmp_path)


@pytest.mark.parametrize(("field", "value"), [("adapter.init", "pissa"), ("train.objective", "dpo")])
def test_what_would_not_go_on_from_it_is_refused(recipe: Recipe, field: str, value: str) -> None:
    problems = recipe.with_("adapter.start", "earlier").with_(field, value).problems()
    assert any("adapter.start" in str(problem) for problem in problems)
