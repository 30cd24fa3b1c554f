"""What a card showed is kept for later plans; which config a word names."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import Setup
from studio.probe.measure import base_config, read_measurement, remember_measurement
from studio.runs.calibration import read_observations
from studio.runs.layout import RunPaths
from tests.fakes.model import safetensors_bytes

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
}
REPORT = {
    "source": "cuda",
    "peaks": {"backward": {"base": 5 * 2**20}, "optimizer": {"base": 2**20}},
    "trainable_parameters": 100,
    "reserved_bytes": 8 * 2**20,
    "device_bytes": 500 * 2**20,
    "card": {"name": "NVIDIA GeForce RTX 4090"},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    shape, setup = shape_from_config(CONFIG), Setup()
    paths = RunPaths(tmp_path / "measure-1")
    paths.root.mkdir()
    paths.plan.write_text(json.dumps(plan_to_dict(estimate_vram(shape, setup), shape, setup)))
    return paths


def test_what_a_card_showed_is_remembered(run: RunPaths) -> None:
    assert remember_measurement(run, REPORT, 100.0) == ""
    (seen,) = read_observations()
    assert (seen.allocated_bytes, seen.reserved_bytes, seen.device_bytes) == (5 * 2**20, 8 * 2**20, 500 * 2**20)
    assert [name for name, _, _ in seen.stages] == ["backward", "optimizer"]
    assert "4090" in seen.setting.device


@pytest.mark.parametrize("change", [{"source": "trace"}, {"card": None}, {"peaks": {}}])
def test_a_trace_or_a_broken_report_teaches_nothing(run: RunPaths, change: dict[str, Any]) -> None:
    why = remember_measurement(run, {**REPORT, **change}, 100.0)
    assert bool(why) is ("source" not in change)
    assert not read_observations()


def test_a_word_names_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for word in (tmp_path, tmp_path / "config.json", tmp_path / "model.safetensors"):
        if word.suffix == ".safetensors":
            word.touch()
        assert base_config(str(word))["hidden_size"] == 64
    with pytest.raises(BadInput, match="nothing-here"):
        base_config(str(tmp_path / "nothing-here"))


@pytest.mark.parametrize(
    ("said", "tensors", "tied"),
    [
        ({}, ("lm_head.weight",), False),
        ({"tie_word_embeddings": True}, ("lm_head.weight",), True),
        ({"text_config": {"tie_word_embeddings": True}}, ("lm_head.weight",), None),
        ({}, ("model.embed_tokens.weight",), None),
    ],
)
def test_a_head_in_the_files_is_the_models_own_where_the_config_says_nothing(
    tmp_path: Path, said: dict[str, Any], tensors: tuple[str, ...], tied: bool | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **said}))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(list(tensors)))
    assert base_config(str(tmp_path)).get("tie_word_embeddings") is tied


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"peaks": 3}', "[" * 10**5])
def test_a_broken_report_is_none(run: RunPaths, text: str) -> None:
    run.report.write_text(text)
    assert read_measurement(run) is None
