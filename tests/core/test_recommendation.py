"""Recommendations: sound recipes for any ground, and each rule where it decides."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.core.evidence import LEAST_ROWS
from studio.core.goals import GOALS, Goal
from studio.core.gpu_catalogue import CATALOGUE, GIB, card_of_size, find_gpu
from studio.core.quantised_base import QuantisedBase
from studio.core.recommendation import DataFacts, Recommendation, recommend
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from tests.examples import examples

EIGHT_B = shape_from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
)
TINY = shape_from_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    }
)
ROWS = DataFacts("rows.jsonl", rows=1000, tokens=300_000, longest_tokens=700)


def shown(recommendation: Recommendation, label: str) -> str:
    return next(choice.shown for choice in recommendation.choices if choice.label == label)


def test_16_bit_where_it_fits_and_4_bit_where_only_they_do() -> None:
    roomy = recommend("style", "base", EIGHT_B, ROWS, gpu=find_gpu("4090"))
    small = recommend("style", "base", EIGHT_B, ROWS, gpu=find_gpu("3060"))
    assert (roomy.recipe.method, roomy.verdict) == ("lora", "fits")
    assert (small.recipe.method, small.verdict) == ("qlora", "fits")


def test_who_has_little_vram_and_much_main_memory_is_shown_the_16_bit_base_with_its_price() -> None:
    gpu = find_gpu("3060")
    found = recommend("style", "base", EIGHT_B, ROWS, gpu=gpu, ram_bytes=32 * GIB)
    assert found.recipe.method == "qlora"
    assert found.streamed is not None
    assert found.streamed.words.count(". ") == 1, "two sentences"
    recipe = found.recipe
    for path, value in found.streamed.settings:
        recipe = recipe.with_(path, value)
    assert recipe.problems() == ()
    assert (recipe.method, recipe.rows_per_step) == ("lora", found.recipe.rows_per_step)
    needs = estimate_vram(EIGHT_B, setup_of(recipe, gpu), gpu)
    assert needs.device.high <= gpu.total_bytes
    for number in (f"{recipe.model.stream} of its 32 layers", f"{needs.host.total / GIB:.1f} GiB of main memory"):
        assert number in found.streamed.words
    assert "this computer has" not in found.streamed.words
    little = recommend("style", "base", EIGHT_B, ROWS, gpu=gpu, ram_bytes=4 * GIB).streamed
    assert little is not None
    assert "(this computer has 4.0)" in little.words
    fewer = recipe.with_("model.stream", int(recipe.model.stream) - 1)
    assert estimate_vram(EIGHT_B, setup_of(fewer, gpu), gpu).device.high > gpu.total_bytes, "the fewest that fit"
    for roomy in (find_gpu("4090"), None):
        assert recommend("style", "base", EIGHT_B, ROWS, gpu=roomy).streamed is None


def test_a_base_that_is_quantised_already_leaves_qlora_or_nothing() -> None:
    four = replace(EIGHT_B, quantised=QuantisedBase("bitsandbytes", 4))
    for gpu in (None, find_gpu("4090")):
        assert recommend("style", "base", four, ROWS, gpu=gpu).recipe.method == "qlora"
    with pytest.raises(BadInput, match=r"the model base\\x1b is already quantised \(gptq, 4 bit\)"):
        recommend("style", "base\x1b", replace(EIGHT_B, quantised=QuantisedBase("gptq", 4)), ROWS)


def test_what_fits_nowhere_is_not_called_fitting() -> None:
    recommendation = recommend("style", "base", EIGHT_B, ROWS, gpu=card_of_size(4))
    assert recommendation.recipe.method == "qlora"
    assert recommendation.verdict == "does not fit"


def test_a_full_card_counts_as_what_is_free_on_it() -> None:
    gpu = find_gpu("4090")
    assert recommend("style", "base", EIGHT_B, ROWS, gpu=gpu, budget_bytes=10 * GIB).recipe.method == "qlora"


@pytest.mark.parametrize(("rows", "held"), [(59, 5), (60, LEAST_ROWS), (149, LEAST_ROWS), (160, 16), (5000, 100)])
def test_from_sixty_rows_on_a_run_can_be_judged(rows: int, held: int) -> None:
    made = recommend("task", "base", TINY, replace(ROWS, rows=rows))
    assert made.recipe.eval.rows == held
    why = next(choice.why for choice in made.choices if choice.label == "Held out")
    assert ("the fewest that a verdict needs" in why) == (held == LEAST_ROWS)


def test_without_a_card_nothing_is_said_of_fitting() -> None:
    recommendation = recommend("task", "base", TINY, ROWS)
    assert (recommendation.recipe.method, recommendation.verdict, recommendation.budget_bytes) == ("lora", None, None)


def test_the_length_is_the_stop_above_the_longest_row_and_has_an_end() -> None:
    assert recommend("style", "base", TINY, ROWS).recipe.train.seq_len == 768
    templated = recommend("style", "base", TINY, replace(ROWS, longest_tokens=760))
    assert templated.recipe.train.seq_len > 768, "a chat template adds to 760 tokens of text"
    endless = replace(ROWS, longest_tokens=50_000)
    recommendation = recommend("style", "base", TINY, endless)
    assert recommendation.recipe.train.seq_len == 2048
    assert any("cut" in choice.why for choice in recommendation.choices)


def test_much_text_widens_the_adapter() -> None:
    much = replace(ROWS, rows=40_000, tokens=400_000_000)
    assert recommend("style", "base", EIGHT_B, ROWS).recipe.adapter.rank == 16
    assert recommend("style", "base", EIGHT_B, much).recipe.adapter.rank > 16


def test_a_short_run_and_a_large_model_have_their_own_rates() -> None:
    wide = shape_from_config(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        }
    )
    long_run = replace(ROWS, rows=20_000)
    assert recommend("style", "base", EIGHT_B, long_run).recipe.train.learning_rate == 2e-4
    assert recommend("style", "base", EIGHT_B, replace(ROWS, rows=200)).recipe.train.learning_rate == 3e-4
    assert recommend("style", "base", wide, replace(ROWS, rows=200)).recipe.train.learning_rate == 1e-4


def test_sixty_rows_of_the_embedded_size_get_the_rate_that_was_measured() -> None:
    small = shape_from_config(
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    assert small.parameters == 134_515_008
    made = recommend("task", "embedded", small, DataFacts("mine.jsonl", rows=60, tokens=1400, longest_tokens=37))
    (rate,) = (choice for choice in made.choices if choice.label == "Learning rate")
    assert made.recipe.train.learning_rate > 3e-4 and "few_rows_results.md" in rate.source
    assert "of about 9 steps" in next(choice.why for choice in made.choices if choice.label == "Held out")


def test_facts_are_sent_to_retrieval() -> None:
    assert "Retrieval" in recommend("facts", "base", TINY, ROWS).instead
    assert [goal for goal, words in GOALS.items() if not words.fits] == ["facts"]


@settings(max_examples=examples(60))
@given(
    goal=st.sampled_from(list(GOALS)),
    shape=st.sampled_from([EIGHT_B, TINY]),
    card=st.sampled_from([None, *CATALOGUE]),
    rows=st.integers(1, 10**6),
    tokens=st.integers(1, 10**9),
    longest=st.integers(1, 10**6),
)
def test_every_advice_is_a_sound_recipe_with_a_reason_for_each_choice(
    goal: Goal, shape: object, card: str | None, rows: int, tokens: int, longest: int
) -> None:
    data = DataFacts("rows.jsonl", rows, tokens, longest, text=goal == "text")
    recommendation = recommend(goal, "base", shape, data, gpu=find_gpu(card) if card else None)  # type: ignore[arg-type]
    assert recommendation.recipe.problems() == ()
    assert recommendation.recipe.rows_per_step == 16
    assert all(choice.why and choice.source and choice.shown for choice in recommendation.choices)
    for choice in recommendation.choices:
        assert all(recommendation.recipe.get(path) == value for path, value in choice.settings)
    if recommendation.budget_bytes is not None and recommendation.verdict == "fits":
        assert recommendation.estimate.device.high <= recommendation.budget_bytes


BOOK = DataFacts("book.txt", rows=1, tokens=2_000_000, longest_tokens=2_000_000, text=True)


def test_raw_text_becomes_blocks_that_lose_nothing() -> None:
    made = recommend("text", "base", EIGHT_B, BOOK, gpu=find_gpu("4090"))
    assert (made.recipe.train.seq_len, made.recipe.adapter.rank >= 128) == (2048, True)
    length = next(choice for choice in made.choices if choice.label == "Length")
    assert "becomes blocks of this length: nothing is cut" in length.why
    assert made.recipe.train.epochs == 3.0 and made.recipe.eval.rows == 97  # a tenth of 977 blocks
    much = recommend("text", "base", EIGHT_B, replace(BOOK, tokens=50_000_000), gpu=find_gpu("4090"))
    assert much.recipe.train.epochs == 1.0 and much.recipe.eval.rows == 100
    assert made.recipe.problems() == much.recipe.problems() == ()
    short = recommend("text", "base", TINY, replace(BOOK, longest_tokens=500, tokens=900))
    assert short.recipe.train.seq_len == 512


def test_what_embeddings_and_head_would_cost_is_estimated() -> None:
    made = recommend("text", "base", EIGHT_B, BOOK, gpu=find_gpu("4090"))
    (choice,) = (choice for choice in made.choices if choice.label == "Embeddings")
    # Embeddings and head have 128256 x 4096 weights each, 16 bytes a weight, and what their step holds besides.
    assert "embed_tokens and lm_head trained whole" in choice.why and "unsloth.ai" in choice.source
    assert 15.6 < float(choice.why.split(": ")[1].split(" GiB")[0]) < 20
    assert made.recipe.adapter.modules_to_save == () and made.recipe.adapter.whole_rate_ratio == 0.2
    tied = recommend("text", "base", replace(EIGHT_B, tied=True), BOOK, gpu=find_gpu("4090"))
    assert any("wants embed_tokens trained whole" in choice.why for choice in tied.choices)
    assert not any(choice.label == "Embeddings" for choice in recommend("domain", "base", EIGHT_B, ROWS).choices)
