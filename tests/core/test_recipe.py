"""The recipe: values in and out, all problems named, unknown keys refused with the nearest name."""

import dataclasses
import datetime
import difflib
import tomllib
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.core.layer_count import LayerCount
from studio.core.recipe import FIELDS, Recipe, choices_of
from studio.core.recipe_parse import apply_settings, recipe_from_dict
from studio.core.value_kinds import Number, Switch
from studio.runs.recipe_file import dump_recipe


def test_default_is_sound_and_survives_toml() -> None:
    assert Recipe().problems() == ()
    assert recipe_from_dict(tomllib.loads(dump_recipe(Recipe()))) == Recipe()


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().name = "other"  # type: ignore[misc]


def test_with_replaces_one_value_and_shares_the_rest() -> None:
    recipe = Recipe()
    changed = recipe.with_("adapter.rank", 64)
    assert (changed.adapter.rank, recipe.adapter.rank) == (64, 16)
    assert changed.train is recipe.train
    assert recipe.with_("adapter.rank", 16) == recipe
    for path in ("adapter", "adapter.rnk", "nothing.rank", "adapter.rank.more", ""):
        with pytest.raises(KeyError):
            recipe.with_(path, 1)


def test_a_value_that_means_a_fields_own_is_taken_as_that() -> None:
    table = {"adapter": {"targets": ["all-linear"], "alpha": 16}, "train": {"micro_batch": 4.0, "steps": 3.0}}
    recipe = recipe_from_dict(table)
    assert recipe.adapter.targets == "all-linear"
    numbers = (recipe.train.micro_batch, recipe.train.steps, recipe.adapter.alpha)
    assert [(type(number), number) for number in numbers] == [(int, 4), (int, 3), (float, 16.0)]
    for value in (2.5, float("inf"), float("nan"), True, "4", 10**400):
        assert [problem.path for problem in Recipe().with_("train.micro_batch", value).problems()] == [
            "train.micro_batch"
        ]


def test_every_problem_is_listed_with_field_found_and_allowed() -> None:
    table = {
        "metod": "lora",
        "method": "dora",
        "adapter": {"rank": 0, "alpha": float("nan"), "targets": []},
        "train": {"lerning_rate": 1e-4, "micro_batch": 2.5, "optimizer": "sgd", "recompute": "some"},
        "device": {"device": "gpu0"},
    }
    with pytest.raises(BadInput) as caught:
        recipe_from_dict(table)
    text = str(caught.value)
    assert "10 problems" in text
    for word in (
        "metod: found an unknown key; wanted perhaps method",
        "method: found 'dora'; wanted lora or qlora",
        "adapter.rank: found 0; wanted 1 to 1024",
        "adapter.alpha: found nan",
        "adapter.targets: found []",
        "perhaps train.learning_rate",
        "train.micro_batch: found 2.5",
        "train.optimizer: found 'sgd'; wanted adamw_torch or adamw_8bit",
        "train.recompute: found 'some'; wanted all, none, auto or a number of layers",
        "device.device: found 'gpu0'; wanted auto, cpu, cuda or cuda:N",
    ):
        assert word in text


def test_a_table_where_a_value_belongs_and_a_value_where_a_table_belongs() -> None:
    for table in ({"train": 3}, {"name": {"a": 1}}, {"adapter": [1]}, {"train": {"steps": {"x": 1}}}):
        with pytest.raises(BadInput):
            recipe_from_dict(table)


def test_settings() -> None:
    recipe = apply_settings(
        Recipe(),
        ["train.learning_rate=2e-4", "adapter.targets=q_proj,v_proj", "train.steps=1_000", "model.double_quant=false"],
    )
    assert recipe.train.learning_rate == 2e-4
    assert recipe.adapter.targets == ("q_proj", "v_proj")
    assert recipe.train.steps == 1000
    assert recipe.model.double_quant is False


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.learning_rate", "no '='"),
        ("train.learningrate=1", "perhaps train.learning_rate"),
        ("rank=8", "perhaps adapter.rank"),
        ("train.steps=many", "'many'"),
        ("train.steps=1.5", "1.5"),
        ("train.recompute=perhaps", "a number of layers"),
        ("train.learning_rate=inf", "inf"),
        ("adapter=3", "unknown key"),
    ],
)
def test_bad_settings_are_named(word: str, expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        apply_settings(Recipe(), [word])
    assert expected in str(caught.value)


def test_problems_between_fields() -> None:
    assert [p.path for p in Recipe().with_("train.epochs", 0.0).problems()] == ["train.steps"]
    assert [p.path for p in Recipe().with_("eval.rows", 0).problems()] == ["eval.samples"]


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"adapter.init": "loftq"}, "adapter.init", "loftq repairs the loss of 4-bit"),
        ({"adapter.init": "pissa", "method": "qlora"}, "adapter.init", "or method lora"),
        ({"adapter.init": "pissa", "adapter.dora": True}, "adapter.init", "adapter.dora false"),
        ({"adapter.rank_pattern": "down_proj"}, "adapter.rank_pattern", "on one line: down_proj=32"),
        ({"adapter.rank_pattern": ["down_proj"]}, "adapter.rank_pattern", "such as { down_proj = 32"),
        ({"adapter.rank_pattern": {"down_proj": 2.5}}, "adapter.rank_pattern", "1 to 1024"),
        ({"adapter.rank_pattern": {"down_proj": True}}, "adapter.rank_pattern", "1 to 1024"),
        ({"adapter.rank_pattern": {"down_proj": {}}}, "adapter.rank_pattern", "1 to 1024"),
        ({"adapter.rank_pattern": "a=1, a=2"}, "adapter.rank_pattern", "on one line: down_proj=32"),
        ({"adapter.rank_pattern": {"*": 2}}, "adapter.rank_pattern", "such as { down_proj = 32"),
        ({"adapter.rank_pattern": {"": 2}}, "adapter.rank_pattern", "such as { down_proj = 32"),
        ({"adapter.rank_pattern": {"([a-z_.0-9]+)+!": 2}}, "adapter.rank_pattern", "no repeated group"),
        ({"adapter.rank_pattern": {".*.*.*.*.*!": 2}}, "adapter.rank_pattern", "at most 4 repeats"),
        ({"adapter.alpha_pattern": {"v_proj": float("nan")}}, "adapter.alpha_pattern", "0.1 to 4096"),
        ({"adapter.layers": "7-3"}, "adapter.layers", "on one line: 0-7, 12"),
        ({"adapter.layers": "0-99999"}, "adapter.layers", "such as [0, 1, 12]"),
        ({"adapter.layers": "first"}, "adapter.layers", "such as [0, 1, 12]"),
        ({"adapter.layers": [0, 10_001]}, "adapter.layers", "from 0 to 10000"),
        ({"adapter.layers": [-1]}, "adapter.layers", "from 0 to 10000"),
        ({"adapter.layers": [True]}, "adapter.layers", "a list of layer numbers"),
        ({"adapter.layers": ["0-7"]}, "adapter.layers", "a list of layer numbers"),
        ({"adapter.layers": 3}, "adapter.layers", "a list of layer numbers"),
        ({"adapter.modules_to_save": ["lm head"]}, "adapter.modules_to_save", "a list of module names"),
        ({"adapter.modules_to_save": ["a", "a"]}, "adapter.modules_to_save", "a list of module names"),
        ({"model.precision": ["a"], "method": "qlora"}, "model.precision", "a table from parts of the model"),
        ({"model.precision": {"a": "8bit"}}, "model.precision", "nf4 or int8 or 16bit"),
        ({"model.precision": {"a": 1}}, "model.precision", "nf4 or int8 or 16bit"),
        ({"model.precision": {"a b": "nf4"}}, "model.precision", "dotted names"),
        ({"model.precision": {"layers.3-1": "nf4"}}, "model.precision", "dotted names"),
        ({"model.precision": {"layers.0-99999.mlp": "nf4"}}, "model.precision", "dotted names"),
    ],
)
def test_problems_of_the_adapter(changes: dict[str, object], path: str, words: str) -> None:
    recipe = Recipe(method="lora")
    for name, value in changes.items():
        recipe = recipe.with_(name, value)
    (problem,) = recipe.problems()
    assert problem.path == path
    assert words in problem.allowed


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("adapter.layers", "0-2, 12", "adapter.layers: found the text '0-2, 12'; wanted a list: [0, 1, 2, 12]"),
        ("adapter.layers", "", "adapter.layers: found the text ''; wanted a list: []"),
        ("model.precision", "layers.0-3=16bit", "wanted a table: { 'layers.0-3' = '16bit' }"),
        ("adapter.modules_to_save", "lm_head, embed_tokens", """wanted a list: ["lm_head", "embed_tokens"]"""),
        ("adapter.rank_pattern", "down_proj=32, layers.0.q=8", "wanted a table: { down_proj = 32, 'layers.0.q' = 8 }"),
        ("adapter.alpha_pattern", "v_proj=0.5", "wanted a table: { v_proj = 0.5 }"),
    ],
)
def test_a_list_or_table_that_is_spelled_as_a_text_is_refused_with_its_spelling(path: str, old: str, new: str) -> None:
    """The spelling that is shown is TOML, and means what the text means on one line."""
    section, _, name = path.partition(".")
    told = _told({section: {name: old}})
    assert new in told
    spelled = tomllib.loads(f"[{section}]\n{name} = {told.rpartition(': ')[2]}")
    assert recipe_from_dict(spelled) == apply_settings(Recipe(), [f"{path}={old}"])


def test_lists_and_tables_are_read_from_toml_and_from_one_line() -> None:
    recipe = apply_settings(
        Recipe(),
        [
            "adapter.layers=12, 0-2,2",
            "adapter.rank_pattern= down_proj = 32, layers.0.q=8, q{1,2}_proj=4 ",
            'adapter.alpha_pattern={ v_proj = 0.5, "o_proj" = 64 }',
            "adapter.modules_to_save=lm_head, model.embed_tokens,",
            'model.precision=layers.0-3=16bit, "model.layers.4.mlp" = int8',
        ],
    )
    assert recipe.adapter.layers == (0, 1, 2, 12)
    assert recipe.adapter.rank_pattern == (("down_proj", 32), ("layers.0.q", 8), ("q{1,2}_proj", 4))
    assert recipe.adapter.alpha_pattern == (("v_proj", 0.5), ("o_proj", 64.0))
    assert recipe.adapter.modules_to_save == ("lm_head", "model.embed_tokens")
    assert recipe.model.precision == (("layers.0-3", "16bit"), ("model.layers.4.mlp", "int8"))
    text = dump_recipe(recipe)
    assert "layers = [0, 1, 2, 12]\n" in text
    assert "alpha_pattern = {v_proj = 0.5, o_proj = 64.0}\n" in text
    assert recipe_from_dict(tomllib.loads(text)) == recipe
    empty = apply_settings(recipe, [f"{path}=" for path in ("adapter.layers", "adapter.rank_pattern")])
    assert (empty.adapter.layers, empty.adapter.rank_pattern) == ((), ())


def test_dots_of_a_module_that_is_written_without_quotes_are_its_name() -> None:
    toml = "[adapter.rank_pattern]\nlayers.0.self_attn.q_proj = 8\nlayers.1.mlp.up_proj = 4\ndown_proj = 2"
    assert recipe_from_dict(tomllib.loads(toml)).adapter.rank_pattern == (
        ("layers.0.self_attn.q_proj", 8),
        ("layers.1.mlp.up_proj", 4),
        ("down_proj", 2),
    )


names = st.from_regex(r"[a-z_]{1,6}(\.[a-z0-9_]{1,6}){0,2}", fullmatch=True)


@given(
    layers=st.lists(st.integers(0, 10_000)),
    ranks=st.dictionaries(names, st.integers(1, 1024)),
    alphas=st.dictionaries(names, st.floats(0.1, 4096)),
    modules=st.lists(names, unique=True),
    bits=st.dictionaries(names, st.sampled_from(["nf4", "int8", "16bit"])),
)
@pytest.mark.slow
def test_what_the_form_shows_on_one_line_is_read_back_as_it_was(
    layers: list[int], ranks: dict[str, int], alphas: dict[str, float], modules: list[str], bits: dict[str, str]
) -> None:
    values = {
        "adapter.layers": layers,
        "adapter.rank_pattern": ranks,
        "adapter.alpha_pattern": alphas,
        "adapter.modules_to_save": modules,
        "model.precision": bits,
    }
    for path, value in values.items():
        recipe = Recipe().with_(path, value)
        assert recipe.problems() == ()
        kind = FIELDS[path].kind
        assert kind.read(kind.written(recipe.get(path))) == recipe.get(path)
        assert recipe_from_dict(tomllib.loads(dump_recipe(recipe))) == recipe


def test_control_characters_of_a_recipe_do_not_reach_the_message() -> None:
    with pytest.raises(BadInput) as caught:
        recipe_from_dict({"\x1b[31mred": 1, "method": "\x1b]0;title\x07"})
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)


def test_every_number_of_the_recipe_is_within_its_own_limits() -> None:
    numbers = {path: field for path, field in FIELDS.items() if isinstance(Recipe().get(path), int | float)}
    switches = {path for path in numbers if isinstance(Recipe().get(path), bool)}
    assert switches | {path for path, field in FIELDS.items() if isinstance(field.kind, Number)} == set(numbers)
    for field in numbers.values():
        if isinstance(number := field.kind, Number):
            assert type(field.default) is number.of
            assert number.low <= field.default <= number.high
            assert all(number.low <= stop <= number.high for stop in number.stops)
            assert list(number.stops) == sorted(set(number.stops))
            assert field.help.endswith(".")
            assert field.cost.endswith(".")


def test_a_field_may_have_the_values_of_its_type() -> None:
    """What is declared as the field's kind is what its annotation says."""
    for section in (Recipe, *(place.default_factory for place in dataclasses.fields(Recipe))):
        if section is dataclasses.MISSING:
            continue
        for name, hint in get_type_hints(section).items():
            path = name if section is Recipe else f"{section.__name__.removesuffix('Section').lower()}.{name}"
            if path not in FIELDS:
                assert dataclasses.is_dataclass(hint)
            elif get_origin(hint) is Literal:
                assert choices_of(path) == get_args(hint)
            elif isinstance(number := FIELDS[path].kind, Number):
                assert number.of is hint
            elif isinstance(layers := FIELDS[path].kind, LayerCount):
                words, count = get_args(hint)
                assert (get_args(words), count) == (layers.words, int)
            elif isinstance(switch := FIELDS[path].kind, Switch) and switch.words:
                assert get_args(hint) == (bool, Literal[switch.words])
            else:
                assert get_origin(hint) is tuple or hint in (str, bool, str | tuple[str, ...])
                assert choices_of(path) == ()


plain_values = st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.booleans())
any_values = st.recursive(
    plain_values, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3))
)


@given(st.sampled_from(sorted(FIELDS)), any_values)
def test_any_value_gives_problems_or_a_recipe_that_survives_toml(path: str, value: object) -> None:
    recipe = Recipe().with_(path, value)
    assert isinstance(FIELDS[path].kind.written(recipe.get(path)), str)
    assert all(problem.found and problem.allowed for problem in recipe.problems())
    if not recipe.problems():
        again = recipe_from_dict(tomllib.loads(dump_recipe(recipe)))
        assert repr(again) == repr(recipe), "the same values of the same types: 2 is not 2.0"


@given(st.text())
def test_any_text_for_any_field_never_crashes(text: str) -> None:
    for path in FIELDS:
        Recipe().with_(path, FIELDS[path].kind.read(text)).problems()


def test_there_is_nothing_to_offload_without_checkpoints() -> None:
    recipe = Recipe().with_("train.offload_checkpoints", True)
    assert recipe.problems() == ()
    (problem,) = recipe.with_("train.recompute", "none").problems()
    assert problem.path == "train.offload_checkpoints"


def test_choices_come_from_the_types() -> None:
    assert choices_of("method") == ("lora", "qlora")
    assert choices_of("train.steps") == ()


def _told(table: dict[str, object]) -> str:
    with pytest.raises(BadInput) as caught:
        recipe_from_dict(table)
    return str(caught.value)


def test_what_was_found_is_written_as_in_a_recipe_and_cut_where_it_is_long() -> None:
    told = _told(
        {
            "name": datetime.date(1979, 5, 27),
            "method": "x" * 300_000,
            "adapter": {"targets": [1, True, ["a"]]},
            "train": {"accumulation": True, "steps": {"a": 1}},
        }
    )
    assert "name: found 1979-05-27; wanted text in quotes" in told
    assert "adapter.targets: found [1, true, ['a']]; wanted" in told
    assert "train.accumulation: found true; wanted" in told
    assert "train.steps: found a table; wanted" in told
    assert "method: found 'xxx" in told
    assert len(told) < 1000


def test_an_unknown_field_of_a_known_table_is_answered_with_its_fields() -> None:
    assert "data.file: found an unknown key; wanted one of the fields of [data]: path, format" in _told(
        {"data": {"file": "rows.jsonl"}}
    )
    assert "train.batch: found an unknown key; wanted perhaps train.micro_batch" in _told({"train": {"batch": 4}})


def test_a_file_of_a_hundred_thousand_foreign_keys_is_refused_in_a_screenful(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda *words, n: asked.append(words) or [])
    told = _told({f"key{number}": 1 for number in range(100_000)})
    assert told.startswith("the recipe has 100000 problems:")
    assert told.endswith("... and 99950 more")
    assert len(told.splitlines()) == 52
    assert len(asked) < 200
