import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.runs.recipe_file import dump_recipe, find_recipe, load_recipe, resolve_paths, shipped_recipes


def _write(folder: Path, text: str | bytes) -> Path:
    path = folder / "r.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_recipe(path)
    return str(caught.value)


def test_every_shipped_recipe_loads_and_survives_writing(tmp_path: Path) -> None:
    shipped = shipped_recipes()
    assert "demo" in shipped
    for name, path in shipped.items():
        recipe = load_recipe(path)
        again = load_recipe(_write(tmp_path, dump_recipe(recipe)))
        assert again == recipe, name
        assert path.read_text().startswith("#"), f"{name} has no head comment"


@given(
    name=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    rate=st.floats(1e-6, 1e-2),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1, unique=True),
)
def test_any_recipe_comes_back_from_toml_as_it_was(name: str, rate: float, targets: list[str]) -> None:
    recipe = Recipe(name=name).with_("train.learning_rate", rate).with_("adapter.targets", tuple(targets))
    again = recipe_from_dict(tomllib.loads(dump_recipe(recipe)))
    assert repr(again) == repr(recipe), "the same values of the same types: 2 is not 2.0"


def test_the_problems_of_file_and_settings_are_told_at_once(tmp_path: Path) -> None:
    path = _write(tmp_path, "mehtod = 'lora'\n[train]\nsteps = -1\n")
    with pytest.raises(BadInput) as caught:
        load_recipe(path, ["adapter.rank=0", "adapter.rnk=3"])
    text = str(caught.value)
    assert "4 problems" in text
    for word in ("mehtod", "train.steps: found -1", "adapter.rank: found 0", "adapter.rnk"):
        assert word in text


def test_settings_mend_a_file_whose_own_fields_contradict_each_other(tmp_path: Path) -> None:
    path = _write(tmp_path, 'method = "qlora"\n[eval]\nrows = 0\nsamples = 3\n[adapter]\ninit = "pissa"\nrank = "x"\n')
    recipe = load_recipe(path, ["eval.samples=0", "method=lora", "adapter.rank=8"])
    assert (recipe.eval.samples, recipe.method, recipe.adapter.rank) == (0, "lora", 8)
    with pytest.raises(BadInput, match="3 problems"):
        load_recipe(path)


def test_settings_are_applied_after_the_file(tmp_path: Path) -> None:
    path = _write(tmp_path, "[train]\nlearning_rate = 1e-4\n")
    assert load_recipe(path, ["train.learning_rate=3e-4", "adapter.rank=8"]).train.learning_rate == 3e-4
    with pytest.raises(BadInput, match=r"train\.learning_rate"):
        load_recipe(path, ["train.learning_rat=3e-4"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = \nmethod = 'lora'", ["not valid TOML", "line 1", "name ="]),
        ("[train]\nsteps = 1\nsteps = 2", ["not valid TOML", "steps = 2"]),
        ("name = 'a'\n\x1b]0;title\x07", ["not valid TOML", r"\x1b]0;title\x07"]),
        ("[[[[", ["not valid TOML", "[[[["]),
        (b"name = '\xff\xfe'", ["not UTF-8", "0xff", "line 1"]),
        (b"a = 1\nb = 2\nname = '\xe4'", ["not UTF-8", "line 3"]),
        ("a = " + "[" * 20_000, ["nested too deeply"]),
        ("[train]\nsteps = " + "9" * 5_000, ["too long"]),
        ("model = 3", ["model: found 3", "[model]"]),
        ("[[model]]\nbase = 'x'", ["model: found a list of tables", "[model]"]),
        ("x" * (2**20 + 1), ["larger than 1 MiB"]),
        ("[trian]\nsteps = 1", ["trian", "train"]),
        (
            "[train]\nsteps = 'many'\nlearning_rate = -1\nlearning_rte = 1",
            ["3 problems", "'many'", "-1", "learning_rte"],
        ),
        ("train = 5", ["train"]),
        ("name = 1979-05-27", ["name"]),
        ("[train]\nlearning_rate = nan", ["learning_rate", "nan"]),
        ("method = 'full'", ["method", "'full'", "lora or qlora"]),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_with_what_and_where(
    tmp_path: Path, text: str | bytes, words: list[str]
) -> None:
    message = _refused(_write(tmp_path, text))
    assert "r.toml" in message
    for word in words:
        assert word in message
    assert "\x1b" not in message


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    assert "no recipe file" in _refused(tmp_path / "missing.toml")
    assert "is a folder" in _refused(tmp_path)
    assert "not a regular file" in _refused(Path("/dev/null"))
    assert "cannot be read" in _refused(_write(tmp_path, "") / "inside")
    assert "cannot be read" in _refused(tmp_path / ("x" * 300))


def test_an_empty_file_and_one_with_a_byte_order_mark_are_recipes(tmp_path: Path) -> None:
    assert load_recipe(_write(tmp_path, "")) == Recipe()
    assert load_recipe(_write(tmp_path, b"\xef\xbb\xbfname = 'bom'\r\n")).name == "bom"


def test_relative_paths_are_meant_from_the_recipe_then_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.jsonl").write_text("")
    (here / "only-here.jsonl").write_text("")
    (beside / "model").mkdir()
    monkeypatch.chdir(here)
    path = _write(beside, "[data]\npath = 'both.jsonl'\neval_path = 'only-here.jsonl'\n[model]\nbase = 'model'\n")
    recipe = load_recipe(path)
    assert load_recipe(path, ["data.path=model:test"]).data.path == f"{beside / 'model'}:test", "a split of a folder"
    assert load_recipe(path, ["data.path=model#a:test"]).data.path == f"{beside / 'model'}#a:test"
    assert load_recipe(path, ["data.path=owner/name:test"]).data.path == "owner/name:test"
    assert recipe.data.path == str(beside / "both.jsonl")
    assert recipe.data.eval_path == str(here / "only-here.jsonl")
    assert recipe.model.base == str(beside / "model")
    assert load_recipe(path, ["data.path=both.jsonl"]).data.path == str(here / "both.jsonl")


def test_words_that_are_no_paths_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    recipe = Recipe().with_("model.base", "owner/name").with_("data.eval_path", "missing.jsonl")
    assert resolve_paths(recipe, (tmp_path,)) == recipe


def test_a_recipe_is_found_by_path_or_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == shipped_recipes()["demo"]
    own = _write(tmp_path, "")
    assert find_recipe("r.toml") == Path("r.toml")
    assert find_recipe(str(own)) == own
    (tmp_path / "demo").write_text("")
    assert find_recipe("demo") == Path("demo")
    with pytest.raises(BadInput, match=r"no recipe 'dem'.*demo"):
        find_recipe("dem")
