"""The race: real runs in processes of their own, one page, and what is kept for the next recipe."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from studio.core.audit_text import markdown_of
from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.audit.lanes import lane_recipe
from studio.probe.quality import audited
from studio.runs.control import request as ask
from studio.runs.control import withdraw
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.quality import read_results
from studio.runs.requests import AuditRequest
from studio.runs.status import Status, run_status
from tests.fakes.runs import CHECKOUT
from tests.jobs.audit_cases import audit
from tests.jobs.conftest import QUESTIONS, history_of


@pytest.fixture
def racing(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe with held-out rows, and a home of its own."""
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]))
    path = tmp_path / "more.jsonl"
    turns = [(f"{question} {n}", f"{reply} {n}") for n in range(7) for question, reply in QUESTIONS]
    table = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("\n".join(json.dumps(row) for row in table))
    return recipe.with_("data.path", str(path)).with_("eval.rows", 8).with_("train.steps", 6)


def race(recipe: Recipe, **more: Any) -> AuditRequest:
    return AuditRequest("race", model=recipe.model.base, recipe=recipe, **more)


KEPT = (("layers.0", "16bit"), ("up_proj", "int8"))


def test_lanes_differ_in_the_method_alone(recipe: Recipe) -> None:
    lora, qlora = (lane_recipe(recipe, name) for name in ("lora", "qlora"))
    assert (lora.method, qlora.method) == ("lora", "qlora")
    assert lora.with_("method", "qlora").with_("name", qlora.name) == qlora
    loftq = lane_recipe(recipe, "qlora+loftq")
    assert (loftq.method, loftq.adapter.init) == ("qlora", "loftq")
    pissa = recipe.with_("adapter.init", "pissa")
    assert lane_recipe(pissa, "lora").adapter.init == lane_recipe(pissa, "qlora").adapter.init == "default"
    with pytest.raises(BadInput, match="it names nothing"):
        lane_recipe(recipe, "qlora+mixed")
    keeping = recipe.with_("model.precision", KEPT)
    assert lane_recipe(keeping, "qlora").model.precision == KEPT, "the recipe's own QLoRA"
    among = ("qlora", "qlora+mixed")
    assert lane_recipe(keeping, "qlora", among).model.precision == ()
    assert lane_recipe(keeping, "qlora+mixed", among).model.precision == KEPT
    with pytest.raises(BadInput, match="wanted lora or qlora"):
        lane_recipe(recipe, "sideways")


@pytest.mark.parametrize("lanes", [("lora",), (), ("lora", "lora")])
def test_a_race_of_one_is_refused(racing: Recipe, tmp_path: Path, lanes: tuple[str, ...]) -> None:
    paths, report = audit(tmp_path / "race", race(racing, lanes=lanes))
    assert not report
    assert "two or more" in history_of(paths).failed.message  # type: ignore[union-attr]


@pytest.mark.slow
def test_two_lanes_one_page_and_the_next_recipe_knows(racing: Recipe, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    _, report = audit(runs / "race", race(racing))
    assert [lane["name"] for lane in report["lanes"]] == ["lora", "qlora"]
    for lane in report["lanes"]:
        paths = RunPaths(runs / lane["run"])
        job = read_job(paths, Recipe)
        assert isinstance(job, Recipe) and job.method == lane["name"] and job.train == racing.train
        assert run_status(paths) is Status.finished
        assert [step for step, _ in lane["curve"]] == [1, 2, 3, 4, 5, 6]
        assert lane["adapter_bytes"] > 1000
        assert lane["peak_predicted_bytes"] and lane["peak_measured_bytes"] and lane["tokens_per_second"]
        # The engine's own held-out loss is the same number: fp32 in both.
        assert lane["task"]["loss"]["value"] == pytest.approx(lane["held_out"][-1][1], rel=1e-4)
    assert report["lanes"][0]["task"]["more"]["value"] == 0.0
    assert "| held-out loss, measured |" in markdown_of(report)
    assert f"that the runs {' and '.join(lane['run'] for lane in report['lanes'])} held out" in report["rows_from"]
    known = audited(racing)
    assert known["qlora"].loss.value == report["lanes"][1]["task"]["loss"]["value"]
    assert known["qlora"].more.value == report["lanes"][1]["task"]["more"]["value"]
    assert audited(racing.with_("train.learning_rate", 1e-4)).keys() == known.keys(), "of the model and data, not more"
    Path(racing.data.path).write_text(Path(racing.data.path).read_text() + "\n" + json.dumps({"text": "more"}))
    assert audited(racing) == {}


@pytest.mark.slow
def test_extra_lanes_start_from_loftq_and_keep_modules(racing: Recipe, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    recipe = racing.with_("train.steps", 2).with_("model.precision", KEPT)
    paths, report = audit(runs / "race", race(recipe, lanes=("qlora", "qlora+loftq", "qlora+mixed")))
    assert report, history_of(paths).failed
    assert [lane["form"] for lane in report["lanes"]] == ["nf4+dq", "nf4+dq", "nf4+dq, layers.0=16bit, up_proj=int8"]
    for lane in report["lanes"]:
        # The engine saw the same bases and starts: its own held-out loss is the same number.
        assert lane["task"]["loss"]["value"] == pytest.approx(lane["held_out"][-1][1], rel=1e-4), lane["name"]
    losses = [lane["task"]["loss"]["value"] for lane in report["lanes"]]
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_a_stopped_race_goes_on_with_its_lanes(racing: Recipe, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    request = race(racing.with_("train.steps", 3))
    root = runs / "race"
    root.mkdir()
    paths = RunPaths(root)
    paths.control.mkdir()
    from studio.runs.job import write_job

    write_job(paths, request)
    ask(paths, "stop")
    audit(root, request)
    assert history_of(paths).finished.outcome == "stopped"  # type: ignore[union-attr]
    begun = json.loads((root / "lanes.json").read_text())
    assert list(begun) == ["lora"]
    withdraw(paths, "stop")
    _, report = audit(root, request)
    assert Path(begun["lora"]).name == report["lanes"][0]["run"]
    assert len(read_results()) == 2
