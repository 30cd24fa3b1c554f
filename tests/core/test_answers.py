"""Answers scored by rules: which rules the held-out answers allow, what each of them calls right."""

import pytest

from studio.core.answers import Answer, Check, checks_for, normalised, score_answers
from studio.core.errors import BadInput


def said(text: str, *, stopped: bool = True) -> Answer:
    return Answer(text, 3, stopped)


def rule(name: str, expected: list[str], pattern: str = "") -> Check:
    return next(check for check in checks_for(expected, pattern) if check.name == name)


def names(expected: list[str], pattern: str = "") -> list[str]:
    return [check.name for check in checks_for(expected, pattern)]


def test_the_rules_are_those_that_the_answers_allow() -> None:
    assert names(["ls -lS", "rm x"]) == ["ends by itself", "exact match", "word F1"]
    assert names(['{"a": 1}', "[1]"])[3:] == ["valid JSON", "same keys", "same JSON"]
    assert "valid JSON" not in names(['{"a": 1}', "no JSON"])
    assert "valid JSON" not in names(["17", '"word"']), "a bare number proves no form"
    assert names([]) == ["ends by itself"], "plain text has no answer"
    assert names([], r"\d") == ["ends by itself", "regex"]


@pytest.mark.parametrize("text", [" LS  -lS.\n", "ls -ls", "ls -lS"])
def test_equal_up_to_what_is_said(text: str) -> None:
    assert normalised(text) == "ls -ls"
    assert rule("exact match", ["ls -lS"]).score(said(text), "ls -lS") == 1


def test_other_words_are_no_match() -> None:
    exact = rule("exact match", ["ls -lS"])
    assert exact.score(said("ls -l"), "ls -lS") == 0
    assert exact.score(said(""), "ls -lS") == 0


@pytest.mark.parametrize(
    ("text", "wanted", "f1"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("a dog", "the cat", 0.0),
        ("the cat", "the cat sat down", 2 / 3),
        ("", "x", 0),
    ],
)
def test_word_f1(text: str, wanted: str, f1: float) -> None:
    assert rule("word F1", [wanted]).score(said(text), wanted) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "valid", "keys", "same"),
    [
        ('{"b": [{"c": null}], "a": 1}', 1, 1, 1),
        ('{"a": 2, "b": [{"c": 1}, {"c": 2}]}', 1, 1, 0),
        ('{"a": 1, "b": []}', 1, 0, 0),
        ('{"a": 1}', 1, 0, 0),
        ('```json\n{"a": 1}\n```', 0, 0, 0),
        ("null", 0, 0, 0),
        ("[" * 100_000, 0, 0, 0),
    ],
)
def test_json(text: str, valid: int, keys: int, same: int) -> None:
    wanted = '{"a": 1, "b": [{"c": null}]}'
    found = {check.name: check.score(said(text), wanted) for check in checks_for([wanted])}
    assert (found["valid JSON"], found["same keys"], found["same JSON"]) == (valid, keys, same)


def test_a_pattern_is_looked_for_or_its_group_compared() -> None:
    assert rule("regex", ["x"], r"^\d+$").score(said("17"), "x") == 1
    assert rule("regex", ["x"], r"^\d+$").score(said("17 or so"), "x") == 0
    agrees = rule("regex agrees", ["x"], r"#### (\d+)")
    assert agrees.score(said("so #### 17"), "thus #### 17") == 1
    assert agrees.score(said("so #### 18"), "thus #### 17") == 0
    assert agrees.score(said("17"), "#### 17") == 0
    with pytest.raises(BadInput, match="no regular expression"):
        checks_for(["x"], "(")


def test_scores_are_paired_with_the_reference() -> None:
    expected = [f"answer {n}" for n in range(12)]
    right = [said(text) for text in expected]
    wrong = [said("nonsense", stopped=False)] * 12
    found = score_answers(rule("exact match", expected), {"tuned": right, "base": wrong}, expected, "tuned")
    assert (found["tuned"].mean.value, found["base"].mean.value) == (1.0, 0.0)
    assert found["base"].more.value == -1.0 and found["base"].more.sign == -1
    assert found["tuned"].more.sign == 0
    ends = score_answers(rule("ends by itself", expected), {"tuned": right, "base": wrong}, expected, "tuned")
    assert ends["base"].mean.value == 0.0


def test_a_graded_rule_has_a_mean_and_noise_has_no_sign() -> None:
    expected = ["one two three four"] * 10
    given = {
        "a": [said("one two")] * 5 + [said("three four")] * 5,
        "b": [said("three four")] * 5 + [said("one two")] * 5,
    }
    found = score_answers(rule("word F1", expected), given, expected, "a")
    few = {"a": [said("one two three four")] * 10, "b": [said("one two")] * 4 + [said("one two three four")] * 6}
    four_apart = score_answers(rule("word F1", expected), few, expected, "a")["b"].more
    assert four_apart.value < 0 and four_apart.sign == 0, "four coins on one side prove nothing"
    many = {**few, "b": [said("one two")] * 8 + [said("one two three four")] * 2}
    assert score_answers(rule("word F1", expected), many, expected, "a")["b"].more.sign == -1
    assert found["a"].mean.value == pytest.approx(2 / 3)
    assert found["b"].more.sign == 0
