"""Grouping by length: every row once an epoch, the same order from the same seed, and far less padding."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from studio.core.recipe import Recipe
from studio.jobs.base.data.rows import Example
from studio.jobs.train.batches import Batcher, StepBatches, padding_share
from studio.runs.control import request, withdraw_all
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_resume import at_step, weights

CPU = torch.device("cpu")


def examples(lengths: list[int]) -> list[Example]:
    return [Example(np.full(length, 5, np.int32), np.full(length, 5, np.int32)) for length in lengths]


def batches(rows: list[Example], micro_batch: int, accumulation: int, *, by_length: bool = True) -> StepBatches:
    batcher = Batcher(micro_batch, 0, CPU)
    group = micro_batch * by_length
    return StepBatches(rows, batcher, rows_per_step=micro_batch * accumulation, seed=3, by_length=group)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 3))
def test_every_row_once_an_epoch_and_the_longest_first(lengths: list[int], micro_batch: int, accumulation: int) -> None:
    rows = examples(lengths)
    made = batches(rows, micro_batch, accumulation)
    per_step = min(micro_batch * accumulation, len(rows))
    steps = 3 * len(rows) // per_step + 1
    seen = [row for step in range(1, steps + 1) for row in made.rows_of(step)]
    for epoch in range(3):
        part = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert {id(row) for row in part} == {id(row) for row in rows}
    assert len(made.of_step(1)[0][0].input_ids) == max(lengths)
    again = batches(rows, micro_batch, accumulation)
    assert [id(row) for row in again.rows_of(steps)] == [id(row) for row in made.rows_of(steps)]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_micro_batches_hold_similar_rows_in_every_epoch(accumulation: int) -> None:
    """Epochs do not end where steps do: 1003 rows leave three of a micro-batch over, and the next epoch goes on."""
    random = np.random.default_rng(1)
    rows = examples(random.lognormal(4, 0.8, 1003).astype(int).clip(4, 512).tolist())

    def share(by_length: bool, first: int, last: int) -> float:
        made = batches(rows, 4, accumulation, by_length=by_length)
        groups = [group for step in range(first, last) for group in made.of_step(step)]
        whole = sum(max(len(row.input_ids) for row in group) * len(group) for group in groups)
        return 1 - sum(len(row.input_ids) for group in groups for row in group) / whole

    per_epoch = 1003 // (4 * accumulation)
    for epoch in range(3):
        first, last = 1 + epoch * per_epoch, 1 + (epoch + 1) * per_epoch
        assert share(True, first, last) < 0.08
        assert share(False, first, last) > (0.4 if accumulation == 1 else 0.25)


def test_steps_are_still_a_mixture() -> None:
    random = np.random.default_rng(2)
    rows = examples(random.integers(4, 400, 800).tolist())
    made = batches(rows, 4, 1)
    means = [np.mean([len(row.input_ids) for row in made.rows_of(step)]) for step in range(2, 200)]
    neighbours = np.corrcoef(means[:-1], means[1:])[0, 1]
    assert abs(neighbours) < 0.2, "long steps do not follow long steps"


def test_the_share_is_what_batches_hold() -> None:
    lengths = np.array([10, 2, 4, 4, 8, 8])
    assert padding_share(lengths, micro_batch=2, rows_per_step=2) == pytest.approx(8 / 44)
    assert padding_share(lengths, micro_batch=2, rows_per_step=6) == pytest.approx(1 - 36 / 44)
    assert padding_share(lengths, micro_batch=4, rows_per_step=6) == pytest.approx(1 - 36 / 48)
    assert padding_share(lengths, micro_batch=8, rows_per_step=8) == pytest.approx(1 - 36 / 60)
    assert padding_share(lengths, micro_batch=1, rows_per_step=3) == 0


def details(paths: RunPaths) -> list[Any]:
    return [
        event.detail for event in read_events(paths.events) if getattr(event, "name", "") == "grouping rows by length"
    ]


def test_a_run_says_what_it_saves_and_resumes_in_the_same_order(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.with_("train.group_by_length", True)
    whole = train(recipe)
    (said,) = details(whole)
    assert said.endswith("without") and said.count("%") == 2
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    withdraw_all(parts)
    train(recipe, again=parts)
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name


def test_nothing_is_said_where_nothing_is_padded(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("train.group_by_length", True)
    assert details(train(recipe.with_("train.micro_batch", 1))) == []
    assert details(train(recipe.with_("train.packing", "on"))) == []
