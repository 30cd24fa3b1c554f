"""Advice on learning from pairs of answers: rates, what a recommendation chooses, what a plan counts."""

from dataclasses import replace

import pytest

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import find_gpu
from studio.core.preferences import preferred_in_words, rate_note
from studio.core.recipe import Recipe
from studio.core.recommendation import recommend
from studio.core.step_work import step_work
from studio.core.stock.setup import stock_setup
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup, setup_of
from tests.core.test_recommendation import EIGHT_B, ROWS, shown


def recipe_of(objective: str, rate: float) -> Recipe:
    return Recipe().with_("train.objective", objective).with_("train.learning_rate", rate)


def test_a_rate_of_supervised_training_is_told_with_the_source_of_a_better_one() -> None:
    assert rate_note(recipe_of("sft", 2e-4)) == ""
    assert {rate_note(recipe_of(*fine)) for fine in (("dpo", 5e-6), ("dpo", 1e-5), ("orpo", 8e-5))} == {""}
    for objective, times, advised in (("dpo", 40, "5e-06"), ("orpo", 5, "8e-05")):
        note = rate_note(recipe_of(objective, 2e-4 if objective == "dpo" else 4e-4))
        assert f"{times} times the {advised} of TRL's script" in note


def test_pairs_are_recommended_dpo_at_its_rate() -> None:
    gpu = find_gpu("4090")
    found = recommend("style", "base", EIGHT_B, replace(ROWS, pairs=True), gpu=gpu)
    train = found.recipe.train
    assert (train.objective, train.learning_rate, train.epochs, train.beta) == ("dpo", 5e-6, 1.0, 0.1)
    assert found.choices[0].label == "Objective"
    assert found.recipe.problems() == ()
    assert rate_note(found.recipe) == ""
    assert {choice.source for choice in found.choices if choice.label in ("Objective", "Learning rate")} == {
        "Rafailov et al. 2023, DPO",
        "TRL's script for DPO with LoRA (trl/scripts/dpo.py)",
    }
    plain = recommend("style", "base", EIGHT_B, ROWS, gpu=gpu)
    assert plain.recipe.train.objective == "sft"
    assert shown(plain, "Learning rate") != shown(found, "Learning rate")
    assert "Objective" not in {choice.label for choice in plain.choices}


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_pair_counts_as_two_sequences_in_memory_and_in_work(objective: str) -> None:
    pair = setup_of(Recipe().with_("train.objective", objective).with_("train.micro_batch", 2))
    rows = replace(pair, objective="sft", micro_batch=4)
    assert (pair.tokens, pair.squares) == (rows.tokens, rows.squares)
    one, other = (estimate_vram(EIGHT_B, setup, find_gpu("4090")) for setup in (pair, rows))
    assert one.stages == other.stages
    assert one.components == other.components
    assert step_work(EIGHT_B, pair) == step_work(EIGHT_B, rows)
    (note,) = set(one.notes) - set(other.notes)
    assert note.startswith("each pair of answers is two full sequences")


def test_a_single_pair_is_a_batch_of_two() -> None:
    """Attention over several rows copies what it need not copy of one (`LayerTraits.batched`)."""
    one, two = (
        estimate_vram(EIGHT_B, Setup(objective=objective, micro_batch=rows, attention="eager"), find_gpu("4090"))  # type: ignore[arg-type]
        for objective, rows in (("dpo", 1), ("sft", 2))
    )
    assert one.stages == two.stages


def test_the_stock_loop_prices_no_pairs() -> None:
    with pytest.raises(BadInput, match=r"prices supervised training alone; found train\.objective dpo"):
        stock_setup(Setup(objective="dpo"))


def test_figures_in_words() -> None:
    figures = {"accuracy": 0.75, "margin": 0.5, "chosen_logp": -12.5, "rejected_logp": -20.0}
    assert preferred_in_words(figures) == (
        "the chosen answer is preferred in 75% of the pairs, margin +0.500, log-probability chosen -12.50, "
        "rejected -20.00"
    )
    assert preferred_in_words({"accuracy": 0.0, "margin": 0.0}).startswith("neither answer is preferred yet")
    assert preferred_in_words({"accuracy": None, "margin": "x"}) == ""
