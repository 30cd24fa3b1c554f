"""A run that is extended: what it does up to its old end is what it would have done, and beyond it what was said."""

from pathlib import Path

import pytest
import torch

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.train import between
from studio.runs.checkpoints import complete_checkpoints
from studio.runs.extension import Wish, extension_for, read_extensions, write_extensions
from studio.runs.layout import RunPaths
from studio.runs.status import Status, run_status
from studio.runs.supervise import refuse_unless_ended
from studio.runs.watch import read_history
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_resume import at_step, weights


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    """Dropout and accumulation, which a resume could get wrong, and no warm-up, which depends on the planned steps."""
    return (
        recipe.with_("train.steps", 4)
        .with_("train.accumulation", 2)
        .with_("train.schedule", "constant")
        .with_("train.warmup_fraction", 0.0)
        .with_("adapter.dropout", 0.2)
        .with_("eval.rows", 1)
        .with_("eval.samples", 1)
        .with_("eval.sample_tokens", 3)
    )


def extend(paths: RunPaths, recipe: Recipe, wish: Wish) -> None:
    """Record an extension as `studio.launch.start.extend` does."""
    found = extension_for(paths, recipe, read_history(paths), wish)
    write_extensions(paths, [*read_extensions(paths), found])


@pytest.mark.parametrize("ended", ["finished", "failed"])
def test_with_a_constant_rate_it_equals_a_run_that_was_planned_longer(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    longer = train(recipe.with_("train.steps", 7))
    recipe = recipe.with_("train.checkpoint_every", 2)

    def crash(self: between.Between) -> None:
        raise RuntimeError("power cut")

    if ended == "failed":
        at_step(monkeypatch, 3, crash)
    paths = train(recipe)
    assert str(run_status(paths)) == ended
    extend(paths, recipe, Wish(steps=3))
    refuse_unless_ended(paths)  # a finished run that was given steps has something left to do
    train(recipe, again=paths)
    seen, wanted = history_of(paths), history_of(longer)
    assert run_status(paths) is Status.finished
    assert seen.started is not None
    assert seen.started.resumed_from == (4 if ended == "finished" else 3)  # the last whole step
    assert seen.total_steps == 7
    assert seen.changed is not None
    assert seen.changed.extensions == [{"after": 4, "steps": 3, "tail": "constant"}]
    assert list(seen.train.steps) == list(range(1, 8))
    assert list(seen.train.losses) == list(wanted.train.losses)
    assert list(seen.train.lrs) == list(wanted.train.lrs)
    for name, weight in weights(longer).items():
        assert torch.equal(weights(paths)[name], weight), name
    with pytest.raises(BadInput, match="runs extend"):
        refuse_unless_ended(paths)


def test_twice_with_other_rates_it_keeps_what_lies_behind_it(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("train.schedule", "cosine")
    peak = recipe.train.learning_rate
    paths = train(recipe)
    first = history_of(paths)
    assert [path.name for path in complete_checkpoints(paths.checkpoints)] == ["step-00000004"]
    extend(paths, recipe, Wish(steps=2))
    train(recipe, again=paths)
    extend(paths, recipe, Wish(steps=2, tail="restart"))
    train(recipe, again=paths)
    seen = history_of(paths)
    assert [one.tail for one in read_extensions(paths)] == ["rewarm", "restart"]
    assert list(seen.train.losses[:4]) == list(first.train.losses)
    assert list(seen.train.lrs[:4]) == list(first.train.lrs)
    # A climb of one step up to the peak, then the fall; and again from the peak on.
    assert list(seen.train.lrs[4:]) == pytest.approx([peak, peak, peak, peak / 2])
    assert [event.step for event in seen.evals] == [0, 4, 6, 8]


def test_what_cannot_be_extended_is_refused_and_says_why(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    paths = train(recipe)
    extend(paths, recipe, Wish(epochs=1))
    rows = history_of(paths).planned
    assert rows is not None
    assert read_extensions(paths)[0].steps == -(-rows.rows // recipe.rows_per_step)
    paths.extensions.write_text('{"schema": 1, "extensions": [{"after": 4, "steps": 0, "tail": "constant"}]}')
    with pytest.raises(BadInput, match="damaged"):
        read_extensions(paths)
    write_extensions(paths, [])
    for folder in complete_checkpoints(paths.checkpoints):
        folder.rename(tmp_path / folder.name)
    with pytest.raises(BadInput, match="none is left"):
        extend(paths, recipe, Wish(steps=3))
    with pytest.raises(BadInput, match="wanted 1 to"):
        (tmp_path / "step-00000004").rename(paths.checkpoints / "step-00000004")
        extend(paths, recipe, Wish(epochs=0.0))
