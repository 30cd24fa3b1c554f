"""The split: deterministic, of the size asked for, and nothing on one side is known from the other."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.evidence import LEAST_ROWS
from studio.probe.data import Conversation, Message, PlainText, Row, few_answers, read_data, row_keys, split, twin_keys


def ask(prompt: str, answer: str) -> Conversation:
    return Conversation((Message("system", "S"), Message("user", prompt), Message("assistant", answer)))


DISTINCT = [ask(f"question {n}", f"answer {n}") for n in range(100)]


def test_same_seed_same_split_other_seed_other_split() -> None:
    assert split(DISTINCT, 20, 17) == split(DISTINCT, 20, 17)
    assert split(DISTINCT, 20, 17).held_out != split(DISTINCT, 20, 18).held_out


def test_the_split_does_not_follow_the_order_of_the_file() -> None:
    forwards, backwards = split(DISTINCT, 20, 17), split(DISTINCT[::-1], 20, 17)
    assert set(forwards.held_out) == set(backwards.held_out)


def test_sizes_and_order() -> None:
    got = split(DISTINCT, 20, 1)
    assert (len(got.train), len(got.held_out), got.notes) == (80, 20, ())
    assert [DISTINCT.index(row) for row in got.held_out] == sorted(DISTINCT.index(row) for row in got.held_out)


def test_at_most_a_fifth_is_held_out_and_it_is_said() -> None:
    got = split(DISTINCT, 60, 1)
    assert len(got.held_out) == 20
    assert "60 held-out rows were asked for; 20 of 100" in got.notes[0]


@pytest.mark.parametrize(("rows", "held"), [(0, 0), (1, 0), (2, 1), (4, 1), (10, 2), (59, 11), (80, 16)])
def test_few_rows(rows: int, held: int) -> None:
    assert len(split(DISTINCT[:rows], 50, 1).held_out) == held


@pytest.mark.parametrize("rows", [60, 74, 75])
def test_from_sixty_rows_on_enough_are_held_out_for_a_verdict(rows: int) -> None:
    assert len(split(DISTINCT[:rows], 50, 1).held_out) == LEAST_ROWS
    assert len(split(DISTINCT[:rows], 9, 1).held_out) == 9


def test_none_asked_none_held() -> None:
    assert split(DISTINCT, 0, 1).train == tuple(DISTINCT)


def test_copies_in_other_case_or_spacing_stay_together() -> None:
    rows = [ask("What is it?", "A thing."), ask("what  is it?", "Another."), ask("Who?", "a THING."), *DISTINCT]
    for seed in range(30):
        held = split(rows, 20, seed).held_out
        assert len({row in held for row in rows[:3]}) == 1


def test_labels_fall_back_to_prompts_and_say_so() -> None:
    rows = [ask(f"Is {n} even?", "yes" if n % 2 else "no") for n in range(100)]
    got = split(rows, 10, 3)
    assert len(got.held_out) == 10
    assert any("answers repeat too often" in note for note in got.notes)


def test_all_rows_alike_hold_nothing_out() -> None:
    got = split([ask("a", "b")] * 50, 5, 3)
    assert got.held_out == ()
    assert "repeat one another" in got.notes[-1]


def test_the_shipped_data_set_gives_what_recipes_ask_for() -> None:
    rows = read_data(Path("embedded")).rows
    got = split(rows, 100, 17)
    assert len(got.held_out) == 100
    assert got.notes == ()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(0, 30), st.integers(0, 5))
def test_never_a_prompt_or_answer_on_both_sides(pairs: list[tuple[int, int]], wanted: int, seed: int) -> None:
    rows = [ask(f"q{p}", f"a{a}") for p, a in pairs]
    got = split(rows, wanted, seed)
    assert sorted(map(repr, got.train + got.held_out)) == sorted(map(repr, rows))
    assert len(got.held_out) <= wanted
    assert not {row.prompt for row in got.train} & {row.prompt for row in got.held_out}
    if not any("only prompts" in note for note in got.notes):
        assert not {row.answer for row in got.train} & {row.answer for row in got.held_out}


def test_plain_texts_are_told_apart_by_their_text() -> None:
    got = split([PlainText(f"text {n}") for n in range(20)] * 2, 8, 3)
    assert len(got.held_out) == 8
    assert not {row.answer for row in got.train} & {row.answer for row in got.held_out}


def test_a_row_is_known_by_its_prompt_and_answer_whatever_case_spacing_or_system_prompt() -> None:
    one, other = row_keys(ask("What  is it?", "A thing.")), row_keys(ask("what is IT?", "a THING."))
    assert one == other
    without = Conversation((Message("user", "What is it?"), Message("assistant", "A thing.")))
    assert row_keys(without) == one
    assert row_keys(ask("What is it?", "Another.")).prompt == one.prompt
    assert len({row_keys(row).content for row in DISTINCT}) == len(DISTINCT)
    assert row_keys(PlainText("a")).prompt == b""
    assert row_keys(ask("ab", "c")).content != row_keys(ask("a", "bc")).content


def test_held_out_rows_that_are_one_answer_paraphrased_are_said_to_be() -> None:
    rows = [ask(f"way {n} to ask for {n % 5}", f"answer {n % 5}") for n in range(60)]
    got = split(rows, 12, 17)
    assert len({row.answer for row in got.held_out}) == 1
    assert got.notes == ("the 12 held-out rows have one and the same answer: they tell nothing about any other",)
    assert "have only 3 different answers" in few_answers(rows[:3] * 4)
    assert few_answers(DISTINCT[:20]) == few_answers([]) == few_answers(DISTINCT[:1]) == ""


def chat(*turns: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[n % 2], turn) for n, turn in enumerate(turns)))


TWINS: dict[str, tuple[Row, ...]] = {
    "punctuation of prompts": (ask("What is it?", "A thing."), ask("what is it", "One."), ask("What, is it?!", "2")),
    "punctuation of answers": (ask("One?", "A thing."), ask("Two?", "a thing"), ask("Three?", "- A **thing**!")),
    "punctuation of texts": (PlainText("Once, upon."), PlainText("Once upon"), PlainText("once  upon!")),
    "other scripts": (ask("\u4f60\u597d\uff1f", "A"), ask("\u4f60\u597d", "B"), ask("\u4f60\u597d\uff01", "C")),
    "a first turn": (chat("Tell me", "A"), chat("tell me.", "B", "And?", "C"), chat("Tell me", "D", "Why?", "E")),
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_twins_stay_together_whatever_the_seed(name: str) -> None:
    rows = [*TWINS[name], *DISTINCT]
    sides = set()
    for seed in range(40):
        got = split(rows, 20, seed)
        held = {row in got.held_out for row in TWINS[name]}
        assert len(held) == 1
        assert (len(got.held_out), got.notes) == (20, ())
        sides |= held
    assert sides == {True, False}, "such rows do not vanish from one side"


@pytest.mark.parametrize(
    ("one", "other"), [("What is 3 + 4?", "What is 34?"), ("?", "!"), ("\u0915\u093e", "\u0915\u0940"), ("ab", "b")]
)
def test_what_means_something_else_is_no_twin(one: str, other: str) -> None:
    assert twin_keys(ask(one, "A")).prompt != twin_keys(ask(other, "A")).prompt
    assert twin_keys(PlainText(one)).answer != twin_keys(PlainText(other)).answer


def test_a_refusal_that_many_rows_share_is_on_both_sides_and_keeps_the_others_apart() -> None:
    """Four in ten rows are refused; they used to be in training alone."""
    refused = [ask(f"forbidden {n}", "I'm sorry, I can't." if n % 2 else "I'm sorry, I can't!") for n in range(80)]
    pairs = [ask(f"way {n} to ask for {n // 2}", f"answer {n // 2}") for n in range(120)]
    for seed in range(10):
        got = split([*refused, *pairs], 20, seed)
        assert len(got.held_out) == 20
        refusals = [row for row in got.held_out if row.answer.startswith("I'm sorry")]
        assert 0 < len(refusals) < 20
        answers = {row.answer for row in got.train}
        assert not any(row.answer in answers for row in got.held_out if row not in refusals)
        assert got.notes[0] == (
            "answers repeat too often to keep them apart: only prompts differ between the two sides for "
            f"{len(refusals)} of 20 held-out rows, such as those with the answer '{refusals[0].answer}'"
        )


def test_a_greeting_with_which_too_many_conversations_begin_keeps_none_out() -> None:
    rows = [chat("Hi", "Hello.", f"question {n}", f"answer {n}") for n in range(100)]
    got = split(rows, 10, 3)
    assert len(got.held_out) == 10
    assert got.notes == (
        "too many conversations begin alike to keep them apart: 10 of 10 held-out rows begin as rows that are trained "
        "on do, such as 'Hi'",
    )


def test_a_prompt_that_more_rows_have_than_are_held_out_is_said_to_be_in_training_alone() -> None:
    got = split([*(ask("write a poem", f"poem {n}") for n in range(30)), *DISTINCT], 20, 3)
    assert len(got.held_out) == 20
    assert got.notes == ("30 rows have one prompt and are all trained on: 'write a poem'",)
    assert not any(row.prompt == "write a poem" for row in got.held_out)


def test_prompts_of_punctuation_are_told_apart_where_there_are_too_many_and_it_is_said() -> None:
    got = split([ask("[" * n + "a" + "]" * n, f"answer {n}") for n in range(100)], 10, 3)
    assert len(got.held_out) == 10
    assert "too many prompts differ in punctuation alone" in got.notes[0]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(("", ".", "?!"))), max_size=60),
    st.integers(0, 30),
    st.integers(0, 5),
)
def test_twins_on_both_sides_are_told_of(rows: list[tuple[int, int, str]], wanted: int, seed: int) -> None:
    got = split([ask(f"q{p}{mark}", f"a{a}{mark}") for p, a, mark in rows], wanted, seed)
    for place, words in ((0, "prompts differ in punctuation alone"), (2, "answers repeat too often")):
        both = {twin_keys(row)[place] for row in got.train} & {twin_keys(row)[place] for row in got.held_out}
        assert bool(both) == any(words in note for note in got.notes)
