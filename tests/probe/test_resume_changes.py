"""What a resume compares: every field of the recipe is trained unless it is listed, and changes are told in words."""

import json

import pytest

from studio.core.recipe import FIELDS, Recipe
from studio.probe.resume import recipe_changes, row_changes, version_changes

FREE = {path for path, field in FIELDS.items() if field.resume != "same"}


def tables(recipe: Recipe) -> dict[str, object]:
    """As they come back from the log."""
    found: dict[str, object] = json.loads(json.dumps(recipe.to_dict()))
    return found


def other(path: str, value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return {"down_proj": 2} if path.endswith("_pattern") else [*value, 3 if path.endswith("layers") else "other"]
    return f"{value}-other"


@pytest.mark.parametrize("path", sorted(set(FIELDS) - FREE))
def test_a_field_that_is_trained_is_refused_by_name(path: str) -> None:
    before = Recipe()
    after = before.with_(path, other(path, before.get(path)))
    trained, rounded = recipe_changes(tables(before), after)
    assert len(trained) == 1
    assert trained[0].startswith(f"{path}: ")
    assert rounded == []
    assert recipe_changes(tables(after), after) == ([], [])


@pytest.mark.parametrize("path", sorted(FREE))
def test_what_is_listed_is_not_refused(path: str) -> None:
    before = Recipe().with_("train.micro_batch", 2).with_("train.accumulation", 4)
    after = before.with_(path, other(path, before.get(path)))
    if path in ("train.micro_batch", "train.accumulation"):
        after = before.with_("train.micro_batch", 4).with_("train.accumulation", 2)
    trained, rounded = recipe_changes(tables(before), after)
    assert trained == []
    assert any(path in words for words in rounded) == (FIELDS[path].resume == "rounded")


def test_other_rows_a_step_are_refused_however_they_come_about() -> None:
    before = Recipe().with_("train.micro_batch", 2).with_("train.accumulation", 4)
    assert recipe_changes(tables(before), before.with_("train.accumulation", 8))[0] == [
        "rows of a step (train.micro_batch x train.accumulation): 8 -> 16"
    ]


def test_a_field_that_an_older_log_lacks_had_its_default() -> None:
    recipe = Recipe()
    table = tables(recipe)
    del table["adapter"]["dora"]  # type: ignore[attr-defined]
    del table["method"]
    assert recipe_changes(table, recipe) == ([], [])
    assert recipe_changes(table, recipe.with_("adapter.dora", True))[0] == ["adapter.dora: false -> true"]


def test_a_table_is_told_as_it_is_typed() -> None:
    before = Recipe().with_("adapter.rank_pattern", {"down_proj": 32, "q_proj": 8})
    trained, _ = recipe_changes(tables(before), before.with_("adapter.rank_pattern", {"down_proj": 16}))
    assert trained == ["adapter.rank_pattern: down_proj=32, q_proj=8 -> down_proj=16"]
    trained, _ = recipe_changes(tables(before), before.with_("adapter.rank_pattern", {"q_proj": 8, "down_proj": 32}))
    assert trained == ["adapter.rank_pattern: down_proj=32, q_proj=8 -> q_proj=8, down_proj=32"]
    trained, _ = recipe_changes(tables(Recipe()), before)
    assert trained == ["adapter.rank_pattern: none -> down_proj=32, q_proj=8"]


@pytest.mark.parametrize(
    "forged", [{}, {"train": 3}, {"train": {"micro_batch": "many"}}, {"adapter": {"rank": {"a": 1}}}]
)
def test_a_forged_table_is_told_as_another_recipe_at_worst(forged: dict[str, object]) -> None:
    trained, rounded = recipe_changes(forged, Recipe())
    assert all("\x1b" not in words for words in [*trained, *rounded])


def test_versions_are_named_with_both() -> None:
    before, now = {"torch": "2.12", "peft": "0.21"}, {"torch": "2.13", "peft": "0.21", "new": "1\x1b[2J"}
    (added, moved) = version_changes(before, now)
    assert moved == "torch 2.12 -> 2.13"
    assert added.startswith("new none -> 1")
    assert "\x1b" not in added


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("abcd", "abdc", "the same 4 rows in another order; the first difference is at training row 3"),
        ("abcd", "abXd", "4 rows as before: 1 no longer there, 1 new; the first difference is at training row 3"),
        ("abcd", "abcdef", "4 rows then, 6 now: 2 new; the first difference is at training row 5"),
        ("abcd", "acd", "4 rows then, 3 now: 1 no longer there; the first difference is at training row 2"),
        ("aab", "abb", "3 rows as before: 1 no longer there, 1 new; the first difference is at training row 2"),
    ],
)
def test_rows_are_told_by_number_and_place(before: str, now: str, said: str) -> None:
    assert row_changes(list(before), list(now)) == said


def test_rows_that_are_not_known_one_by_one_are_another_content() -> None:
    assert row_changes(None, ["a"]) == "they have another content or order"
