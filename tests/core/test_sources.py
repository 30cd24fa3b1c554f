"""The sources of a mixture: how they are spelled, and how many rows are drawn of each."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.core.recipe import FIELDS, Recipe
from studio.core.recipe_parse import apply_settings
from studio.core.sources import Source, drawn_rows
from studio.runs.recipe_file import dump_recipe, load_recipe

KIND = FIELDS["data.sources"].kind


def test_a_line_names_files_with_weights() -> None:
    recipe = apply_settings(Recipe(), ["data.sources=a.jsonl=2, b=c.jsonl=0.5, d.jsonl"])
    assert recipe.data.sources == (Source("a.jsonl", 2.0), Source("b=c.jsonl", 0.5), Source("d.jsonl"))
    assert recipe.data.words == ("a.jsonl", "b=c.jsonl", "d.jsonl")


@given(
    st.lists(
        st.builds(
            Source,
            st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip),
            st.sampled_from((0.0, 0.5, 2.0)),
        )
        | st.builds(
            Source, st.sampled_from(("a.jsonl", "[x]", "a,b=2")), rows=st.integers(1, 9), format=st.just("chat")
        )
        | st.builds(
            Source,
            st.just("a.b"),
            columns=st.sampled_from(((), (("prompt", 'the "question"'), ("completion", "a=b")))),
            prompt=st.sampled_from(("", "{{ title }}: {{ body }}")),
        ),
        max_size=4,
    ).map(tuple)
)
def test_what_is_written_is_read_again(sources: tuple[Source, ...]) -> None:
    assert KIND.shaped(KIND.stored(sources)) == sources
    if sources:
        read = KIND.read(KIND.written(sources))
        # A line takes white space around names away.
        assert [replace(one, path=one.path.strip()) for one in sources] == [
            replace(one, path=one.path.strip()) for one in read
        ]


def test_a_recipe_file_holds_them_and_finds_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    sources = '[[data.sources]]\npath = "a.jsonl"\nweight = 2\n[[data.sources]]\npath = "embedded"\nrows = 5\n'
    (tmp_path / "recipe.toml").write_text(sources)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.data.sources == (Source(str(tmp_path / "a.jsonl"), 2.0), Source("embedded", rows=5))
    (tmp_path / "again.toml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.toml") == recipe
    mapped = recipe.with_("data.sources", [{"path": "a", "columns": {"prompt": "Frage"}, "prompt": "{{ Frage }}?"}])
    assert mapped.problems() == () and mapped.data.sources[0].columns == (("prompt", "Frage"),)
    (tmp_path / "again.toml").write_text(dump_recipe(mapped))
    assert load_recipe(tmp_path / "again.toml") == mapped


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{path="a", weight=1, rows=2}]', "source 1: weight and rows"),
        ('[{path="a"}, {paht="b"}]', "source 2: the key paht"),
        ('[{path="a", rows=0}]', "rows = 0"),
        ('[{path="a", weight=-1}]', "weight = -1"),
        ('[{path="a", format="csv"}]', "format = 'csv'"),
        ("[{weight=1}]", "path = nothing"),
        ("[3]", "source 1: 3"),
        ('[{path="a", columns={prompd="x"}}]', "perhaps prompt"),
        ("[{path=", "wanted a list of tables"),
    ],
)
def test_a_wrong_source_is_named(text: str, told: str) -> None:
    with pytest.raises(BadInput, match=r"data\.sources") as caught:
        apply_settings(Recipe(), [f"data.sources={text}"])
    assert told in str(caught.value)


def test_one_file_and_a_mixture_are_too_much() -> None:
    with pytest.raises(BadInput, match=r"data.path: found mine.jsonl beside data.sources"):
        apply_settings(Recipe(), ["data.sources=a.jsonl, b.jsonl", "data.path=mine.jsonl"])


def test_weights_share_out_what_is_there_without_repeats() -> None:
    three = (Source("a", 2.0), Source("b", 1.0), Source("c", rows=7), Source("d"))
    assert drawn_rows(three, [100, 1000, 3, 9]) == [100, 50, 7, 9]
    # Shares of tokens: rows of b are ten times as long.
    assert drawn_rows(three[:2], [100, 1000], [10.0, 100.0]) == [100, 5]


@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(1, 5000), st.floats(1, 900)), min_size=1, max_size=5))
def test_shares_are_those_of_the_weights(given: list[tuple[float, int, float]]) -> None:
    sources = [Source(str(place), weight) for place, (weight, _, _) in enumerate(given)]
    there, sizes = [rows for _, rows, _ in given], [size for *_, size in given]
    drawn = drawn_rows(sources, there, sizes)
    assert all(1 <= count <= rows for count, rows in zip(drawn, there, strict=True))
    assert any(count == rows for count, rows in zip(drawn, there, strict=True))
    exact = min(rows * size / weight for weight, rows, size in given)
    for (weight, _, size), count in zip(given, drawn, strict=True):
        assert abs(count - max(1.0, exact * weight / size)) <= 1
