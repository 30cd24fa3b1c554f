"""Advice: which rates are named for which models, and what is tried after a run that did not beat its base."""

from dataclasses import replace
from statistics import fmean

import pytest

from studio.core.advice import MEASURED_FALLS, Learnt, advised_rate, next_tries
from studio.core.intervals import Interval
from studio.core.recipe import Recipe
from studio.core.recommendation import ROWS_PER_STEP
from tests.bench.few_rows import RESULTS, found, results

EMBEDDED = (134_515_008, 576)
EIGHT_B = (8_030_000_000, 4096)
NOTHING, WORSE = Interval(-0.001, -0.02, 0.018), Interval(0.3, 0.2, 0.4)
RECIPE = Recipe().with_("train.learning_rate", 2e-5).with_("train.epochs", 3.0)
RECIPE = RECIPE.with_("train.micro_batch", 1).with_("train.accumulation", 16)
RAN = Learnt(
    steps=9, planned=9, rows=45, held_out_rows=15, gain=NOTHING, held_out=((0, 2.0), (9, 1.999)),
    training=(2.0, 1.98), model=EIGHT_B,
)  # fmt: skip


def settings_of(recipe: Recipe, learnt: Learnt, improved: bool | None) -> dict[str, object]:
    """What the tries change, all of them together, in a recipe that stays sound."""
    changed = {path: value for one in next_tries(recipe, learnt, improved) for path, value in one.settings}
    for path, value in changed.items():
        recipe = recipe.with_(path, value)
    assert recipe.problems() == ()
    return changed


@pytest.mark.parametrize(
    ("parameters", "hidden", "steps", "rate", "said"),
    [
        (8_030_000_000, 4096, 900, 2e-4, "published for this width: 2e-4 to 4.7e-4"),
        (8_030_000_000, 4096, 11, 3e-4, "a short run (11 steps) bears 1.5 times"),
        (70_600_000_000, 8192, 11, 1e-4, "published for this width: 1e-4 to 4.5e-4"),
    ],
)
def test_other_sizes_get_what_is_published(parameters: int, hidden: int, steps: int, rate: float, said: str) -> None:
    advised = advised_rate(parameters, hidden, steps)
    assert advised.value == rate and advised.least <= rate <= advised.most
    assert said in advised.why and "Schulman" in advised.source and "Dettmers" in advised.source


def test_the_embedded_model_gets_the_rate_that_was_measured() -> None:
    lines = [line for line in found() if line["task"] == "docstrings" and line["rows_per_step"] == ROWS_PER_STEP]
    falls: dict[int, dict[float, list[float]]] = {}
    for line in lines:
        falls.setdefault(line["steps"], {}).setdefault(line["rate"], []).append(-line["gain"]["value"])
    meant = {
        steps: {rate: round(fmean(values), 2) for rate, values in by_rate.items()} for steps, by_rate in falls.items()
    }
    assert meant == MEASURED_FALLS
    for steps in (9, 11, 60):
        advised = advised_rate(*EMBEDDED, steps)
        assert advised.value == max(meant[9], key=meant[9].__getitem__) > 3e-4
        assert "few_rows_results.md" in advised.source and "9 steps lowered the held-out loss" in advised.why
    assert RESULTS.read_text(encoding="utf-8") == results(found())


def test_what_was_measured_holds_for_its_size_and_short_runs_alone() -> None:
    measured = advised_rate(*EMBEDDED, 60).value
    for parameters, hidden, steps in ((360_000_000, 960, 60), (70_000_000, 512, 60), (*EMBEDDED, 900)):
        advised = advised_rate(parameters, hidden, steps)
        assert advised.value < measured and "Schulman" in advised.source


def test_a_run_that_beat_its_base_is_told_nothing() -> None:
    assert next_tries(RECIPE, RAN, True) == ()


def test_a_timid_run_is_told_the_rate_and_more_steps() -> None:
    first, second = next_tries(RECIPE, RAN, False)
    assert first.words.startswith("raise the learning rate from 2e-5 to 3e-4: a short run (9 steps)")
    assert second.words == "take 4 rows a step, not 16: 34 steps of the same rows instead of 9"
    assert settings_of(RECIPE, RAN, False) == {
        "train.learning_rate": 3e-4, "train.micro_batch": 1, "train.accumulation": 4,
    }  # fmt: skip


def test_at_the_advised_rate_twice_of_it_is_next() -> None:
    bold = RECIPE.with_("train.learning_rate", 4e-4)
    assert settings_of(bold, RAN, False)["train.learning_rate"] == 8e-4
    unknown = replace(RAN, model=None)
    assert settings_of(RECIPE, unknown, False)["train.learning_rate"] == 4e-5


def test_few_rows_of_a_fixed_number_of_steps_get_more_of_them() -> None:
    assert settings_of(RECIPE.with_("train.steps", 9), RAN, False)["train.steps"] == 18
    small = RECIPE.with_("train.micro_batch", 4).with_("train.accumulation", 1)
    assert settings_of(small, RAN, False)["train.epochs"] == 6.0


def test_rows_learnt_by_heart_want_more_rows() -> None:
    tries = next_tries(RECIPE, replace(RAN, training=(2.0, 0.1)), False)
    assert "the 45 rows were learnt by heart" in tries[0].words and tries[0].settings == ()
    assert tries[-1].settings == (("train.epochs", 1.0),)


def test_an_interval_that_could_hide_an_effect_wants_more_held_out_rows() -> None:
    wide = replace(RAN, gain=Interval(-0.1, -0.5, 0.3), steps=60, planned=60)
    assert any("hold out more than 15 rows: up to 0.50 nats" in one.words for one in next_tries(RECIPE, wide, False))


def test_a_loss_that_rose_late_is_stopped_where_it_was_lowest() -> None:
    turned = replace(RAN, gain=WORSE, held_out=((0, 2.0), (3, 1.5), (6, 1.8), (9, 2.3)))
    assert settings_of(RECIPE, turned, False) == {"train.steps": 3}


def test_a_loss_that_rose_from_the_start_gets_a_lower_rate_and_fewer_passes() -> None:
    harmed = replace(RAN, gain=WORSE, held_out=((0, 2.0), (9, 2.3)))
    wild = settings_of(RECIPE.with_("train.learning_rate", 1e-2), harmed, False)
    assert wild == {"train.learning_rate": 3e-4, "train.epochs": 1.0}
    assert settings_of(RECIPE, harmed, False)["train.learning_rate"] == 1e-5


def test_pairs_keep_to_the_rate_of_their_objective() -> None:
    pairs = RECIPE.with_("train.objective", "dpo").with_("train.learning_rate", 2e-4)
    assert settings_of(pairs, RAN, False)["train.learning_rate"] == 5e-6


def test_a_run_that_cannot_be_judged_is_told_what_would_judge_it() -> None:
    assert settings_of(RECIPE, replace(RAN, rows=195, held_out_rows=5), None) == {"eval.rows": 15}
    (few,) = next_tries(RECIPE, replace(RAN, rows=35, held_out_rows=5), None)
    assert few.words.startswith("find more rows: 15 rows with 100 learnt tokens") and "40 in all" in few.words
    (short,) = next_tries(RECIPE, replace(RAN, rows=385, held_out_rows=15), None)
    assert short.settings == (("eval.rows", 30),), "the fifteen had too few tokens"
    file = next_tries(RECIPE.with_("data.eval_path", "held.jsonl"), RAN, None)
    assert "data.eval_path" in file[0].words


def test_a_run_that_was_stopped_early_is_to_be_ended_first() -> None:
    (only,) = next_tries(RECIPE, replace(RAN, steps=4), None)
    assert "runs resume RUN" in only.words and not only.settings
