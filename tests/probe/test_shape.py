"""Shapes of real places: folders, lone files, headers that contradict the config."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.quantised_base import QuantisedBase
from studio.core.recipe import Recipe
from studio.probe.cards import Card
from studio.probe.device import Place
from studio.probe.embedded_model import embedded_header, find_embedded
from studio.probe.gguf_header import GgufHeader
from studio.probe.models import BaseFound, find_base
from studio.probe.plan import plan_for
from studio.probe.shape import config_of_gguf, find_shape

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, tensors: dict[str, tuple[str, list[int]]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = (2 if dtype == "BF16" else 1) * shape[0] * shape[1]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))
    return folder


def test_a_folder_needs_only_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    by_folder, by_file = find_shape(str(tmp_path)), find_shape(str(tmp_path / "config.json"))
    assert by_folder == by_file
    assert by_folder.layers == 2


def test_headers_settle_the_number_of_parameters(tmp_path: Path) -> None:
    expected = find_shape(str(write_config(tmp_path))).parameters
    folder = write_model(
        tmp_path / "more", {"w": ("BF16", [expected + 5000, 1]), "lm_head.weight": ("BF16", [100, 64])}
    )
    shape = find_shape(str(folder))
    assert shape.parameters == expected + 5000, "a tied head that was saved all the same is counted once"
    assert "its weights are" in shape.doubts[0]
    nearly = find_shape(str(write_model(tmp_path / "nearly", {"w": ("BF16", [expected + 3, 1])})))
    assert nearly.parameters == expected + 3
    assert nearly.doubts == ()


def write_config(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_packed_weights_say_nothing_of_the_number(tmp_path: Path) -> None:
    packed = write_model(tmp_path / "packed", {"w": ("U8", [40, 10])})
    assert find_shape(str(packed)) == find_shape(str(write_config(tmp_path)))


def test_packed_weights_that_the_config_does_not_explain_are_a_doubt(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": ("U8", [40, 10])}
    (doubt,) = find_shape(str(write_model(tmp_path / "packed", tensors))).doubts
    assert "up_proj.weight lies in U8" in doubt
    explained = write_model(tmp_path / "said", tensors, quantization_config={"quant_method": "gptq", "bits": 4})
    shape = find_shape(str(explained))
    assert (shape.doubts, shape.quantised) == ((), QuantisedBase("gptq", 4))


def test_only_the_weights_that_are_loaded_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"w": ("BF16", [8, 8])})
    shape = find_shape(str(folder))
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"damaged")
    assert find_shape(str(folder)) == shape


def test_a_lone_safetensors_file_lacks_its_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"w": ("BF16", [8, 8])})
    assert find_shape(str(folder / "model.safetensors")).hidden == 64
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match=r"config\.json"):
        find_shape(str(folder / "model.safetensors"))


@pytest.mark.parametrize("word", ["a\0b", "nowhere/at/all", "\x1b[31m/x", "~nobody-by-that-name/x"])
def test_a_word_that_names_nothing(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput) as caught:
        find_shape(word)
    assert "\x1b" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_the_embedded_gguf_is_the_model_that_it_becomes() -> None:
    embedded = find_embedded()
    by_header = find_shape(str(embedded.gguf))
    assert by_header.quantised == QuantisedBase("gguf"), "named as a file, it is one that nobody trains on"
    assert replace(by_header, quantised=None) == find_shape("embedded")
    assert by_header.parameters == embedded_header(embedded).parameters == 134_515_008
    assert by_header.tied


def test_a_gguf_of_another_family() -> None:
    sizes = {"embedding_length": 64, "feed_forward_length": 128, "block_count": 2, "attention.head_count": 4}
    header = GgufHeader(
        {"general.architecture": "gemma3", **{f"gemma3.{key}": value for key, value in sizes.items()}},
        {"token_embd.weight": (64, 1000)},
    )
    config = config_of_gguf(header)
    assert (config["model_type"], config["vocab_size"], config["tie_word_embeddings"]) == ("gemma3_text", 1000, True)


def test_the_plan_of_a_run(tmp_path: Path) -> None:
    card = Card(0, "Tesla T4", None, 15360 * 2**20, 0, 15000 * 2**20, (7, 5))
    plan = plan_for(Recipe(), find_base("embedded"), place=Place(card))
    assert plan["peak_bytes"] > 0
    assert plan["fits"] is True
    assert plan["setup"]["dtype"] == "fp16"
    assert plan["budget_bytes"] == 15000 * 2**20
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert plan_for(Recipe(), find_base("embedded"), place=Place())["budget_bytes"] is None


@pytest.mark.parametrize("config", [None, {}, {"model_type": "odd"}, {**CONFIG, "hidden_size": "x"}])
def test_an_odd_model_never_keeps_a_run_from_starting(config: dict[str, Any] | None) -> None:
    plan = plan_for(Recipe(), BaseFound("hub", "owner/name", None, config, 0), place=Place())
    assert plan["estimate"] is None
    assert plan["why"]


def test_an_unforeseen_fault_is_an_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(base: BaseFound) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("studio.probe.plan.shape_of_base", broken)
    assert plan_for(Recipe(), BaseFound("hub", "o/n", None, CONFIG, 0), place=Place()) == {
        "estimate": None,
        "why": "ZeroDivisionError: oops",
    }
