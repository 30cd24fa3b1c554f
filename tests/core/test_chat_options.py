"""Settings that chats alone have: parts of an answer, and variables for the chat template."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.core.chat_options import PARTS, Several, TemplateVariables
from studio.core.recipe import Recipe
from tests.examples import examples

PART, VARIABLES = Several(PARTS), TemplateVariables()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("answer", ("answer",)),
        ("calls, answer", ("answer", "calls")),
        ('["reasoning", "calls"]', ("reasoning", "calls")),
    ],
)
def test_parts_are_read_in_their_order(text: str, value: tuple[str, ...]) -> None:
    assert PART.read(text) == value
    assert not list(PART.wrong(value))
    assert PART.read(PART.written(value)) == value
    assert PART.shaped(PART.stored(value)) == value


@pytest.mark.parametrize("value", [(), ("anser",), ("answer", "answer"), "answer", 3, None, (1,)])
def test_other_parts_are_wrong(value: Any) -> None:
    (wrong,) = PART.wrong(PART.shaped(value))
    assert "reasoning, answer, calls" in wrong[1]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ()),
        ("enable_thinking=false", (("enable_thinking", False),)),
        ('{ thinking = true, date = "26 Jul 2024" }', (("thinking", True), ("date", "26 Jul 2024"))),
        ("effort=low, budget=12, part=0.5", (("effort", "low"), ("budget", 12), ("part", 0.5))),
        ("{ thinking = true, effort = low }", (("thinking", True), ("effort", "low"))),
        (r"""{ "said" = "a\nb", date = '1 May', top = 1_000 }""", (("said", "a\nb"), ("date", "1 May"), ("top", 1000))),
        (r'said="a, \"b\" = c\\"', (("said", 'a, "b" = c\\'),)),
    ],
)  # fmt: skip
def test_variables_are_read(text: str, value: tuple[tuple[str, Any], ...]) -> None:
    assert VARIABLES.read(text) == value
    assert not list(VARIABLES.wrong(value))
    assert VARIABLES.shaped(VARIABLES.stored(value)) == value


VALUES = st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(max_examples=examples(100))
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4))
def test_what_is_written_is_read_again(table: dict[str, Any]) -> None:
    value = VARIABLES.shaped(table)
    if not list(VARIABLES.wrong(value)):
        again = VARIABLES.read(VARIABLES.written(value))
        assert again == value
        assert [type(one) for _, one in again] == [type(one) for _, one in value]


@pytest.mark.parametrize("text", ["enable_thinking", "a=1, a=2", "=1", 'a="b'])
def test_what_cannot_be_read_stays_a_text(text: str) -> None:
    assert VARIABLES.read(text) == text
    assert list(VARIABLES.wrong(text))


@pytest.mark.parametrize(
    "table", [{"messages": "a"}, {"tools": True}, {"a b": 1}, {"a": [1]}, {"a": None}, {"a": "\0"}]
)
def test_variables_that_no_template_may_be_told_are_wrong(table: dict[str, Any]) -> None:
    assert list(VARIABLES.wrong(VARIABLES.shaped(table)))


@pytest.mark.parametrize(("path", "value"), [("data.learn", ["answer"]), ("data.last_answer_only", True)])
def test_a_choice_of_what_is_learnt_does_not_go_with_learning_everything(path: str, value: Any) -> None:
    recipe = Recipe().with_(path, value)
    assert recipe.problems() == ()
    (problem,) = recipe.with_("data.answers_only", False).problems()
    assert problem.path == path
    assert "data.answers_only false" in problem.found
