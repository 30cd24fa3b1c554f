"""A finished run is remembered: what was predicted for its own batches beside what was measured."""

import json
from dataclasses import replace
from pathlib import Path

from studio.core.recipe import Recipe
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.probe.calibrate import observe, remember_run
from studio.probe.pace import pace_of, process_of
from studio.probe.setting import setting_of
from studio.probe.shape import find_shape
from studio.runs.calibration import observation_to_dict, read_observations
from tests.jobs.conftest import Train, history_of


def test_a_cpu_run_teaches_speed_and_size_of_its_process(
    recipe: Recipe, train: Train, own_calibration: Path, tiny: Path
) -> None:
    paths = train(recipe.with_("train.steps", 6))
    (found,) = read_observations(own_calibration)
    assert found.run == paths.name
    assert found.setting == setting_of("cpu", "lora"), "a plan made now on this machine is of the same setting"
    assert found.setting.device.startswith("cpu: ")
    history = history_of(paths)
    seconds, tokens = sum(history.train.seconds[2:]), sum(history.train.tokens[2:])
    assert found.operations_per_second is not None
    assert found.operations_per_second > 6 * 50_000 * tokens / seconds, "six operations per weight and token at least"
    assert found.resident_bytes is not None
    assert found.process_bytes is not None
    assert found.predicted[0] < found.resident_bytes
    assert found.speed_factor is None
    assert history.warnings == []
    report = json.loads(paths.report.read_bytes())["estimate"]
    assert report == observation_to_dict(found), "the run itself keeps estimate and measurement beside each other"


def test_the_prediction_is_for_the_batches_that_ran(recipe: Recipe, train: Train, own_calibration: Path) -> None:
    """Rows of 20 tokens say nothing about a plan for 64."""
    paths = train(recipe.with_("train.steps", 6))
    planned = history_of(paths).planned
    assert planned is not None
    assert planned.batch_tokens is not None
    assert 2 <= planned.batch_tokens < recipe.train.micro_batch * recipe.train.seq_len
    (found,) = read_observations(own_calibration)
    longer = observe(
        "x", recipe.with_("train.steps", 6), find_shape(recipe.model.base), _stretched(history_of(paths)), now=1.0
    )
    assert longer is not None
    assert longer.predicted[0] > found.predicted[0]


def _stretched(history):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    history.planned = replace(history.planned, batch_tokens=4096)
    return history


def test_the_next_plan_knows_this_processor(recipe: Recipe, train: Train, own_calibration: Path) -> None:
    recipe = recipe.with_("train.steps", 8)
    shape = find_shape(recipe.model.base)
    setup = replace(setup_of(recipe), seq_len=20)
    assert pace_of(recipe, shape, setup, None).speed is None
    history = history_of(train(recipe))
    measured = sum(history.train.tokens[2:]) / sum(history.train.seconds[2:])
    speed = pace_of(recipe, shape, setup, None).speed
    assert speed is not None
    assert speed.low < measured < speed.high
    process = process_of(estimate_vram(shape, setup), setup)
    assert process is not None
    assert process.low < max(history.memory.resident_peak_bytes) < process.high


def test_a_run_of_a_few_steps_says_nothing(recipe: Recipe, train: Train, own_calibration: Path) -> None:
    train(recipe.with_("train.steps", 3))
    assert read_observations(own_calibration) == ()


def test_what_cannot_be_remembered_is_a_warning_and_no_failure(
    recipe: Recipe, train: Train, own_calibration: Path
) -> None:
    own_calibration.parent.write_text("a file where the home should be")
    history = history_of(train(recipe.with_("train.steps", 6)))
    assert history.finished is not None
    assert any(event.topic == "calibration" for event in history.warnings)


def test_a_run_folder_that_tells_nothing_is_no_error(tmp_path: Path, recipe: Recipe) -> None:
    from studio.runs.layout import RunPaths

    assert remember_run(RunPaths(tmp_path), recipe, 1.0) == ""
