"""A run on a mixture: its events tell the shares, a resume draws the same rows, its audit finds the held-out ones."""

import json
from pathlib import Path

import pytest

from studio.core.events import Phase, Warned
from studio.core.recipe import Recipe
from studio.jobs.train import between
from studio.probe.audit import audit_of_run, rows_to_measure
from studio.probe.resume import check_resume
from studio.runs.control import request, withdraw_all
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.jobs.conftest import Train, history_of


@pytest.fixture
def recipe(recipe: Recipe, data: Path, tmp_path: Path) -> Recipe:
    other = tmp_path / "other.jsonl"
    lines = [{"text": f"{number} is a number, and {number + 1} comes after it"} for number in range(30)]
    other.write_text("\n".join(map(json.dumps, lines)))
    sources = [{"path": str(data), "weight": 2}, {"path": str(other), "weight": 3}]
    return recipe.with_("data.path", "embedded").with_("data.sources", sources).with_("eval.rows", 3)


def test_a_resumed_mixture_equals_an_uninterrupted_one(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe)
    events = list(read_events(whole.events))
    told = [event.detail for event in events if isinstance(event, Phase) and event.detail.startswith("a mixture")]
    assert told and "other.jsonl 9 of 30 rows (60% of the rows, about" in told[0]
    warned = [event.message for event in events if isinstance(event, Warned)]
    assert any(message.startswith("held out of data.jsonl ") for message in warned)
    after_step = between.Between.after_step

    def stop(self: between.Between, progress: object) -> bool:
        if getattr(progress, "step", 0) == 2:
            request(self.worker.paths, "stop")
        return after_step(self, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(between.Between, "after_step", stop)
    parts: RunPaths = train(recipe)
    monkeypatch.setattr(between.Between, "after_step", after_step)
    withdraw_all(parts)
    check_resume(parts, recipe)
    train(recipe, again=parts)
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    asked = audit_of_run(whole)
    assert sorted(rows_to_measure(asked).hashes) == sorted(rows_to_measure(audit_of_run(parts)).hashes)
    assert rows_to_measure(asked).held_out_rows == 3
