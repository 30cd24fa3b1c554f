"""`lora-studio plan` on bases that are damaged, or quantised already: what is said, and that `train` agrees."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.commands import card_flags as verb
from studio.probe.device import Sight
from studio.probe.embedded_model import find_embedded
from tests.cli.conftest import Cli
from tests.core.published_rows import DATA
from tests.fakes.model import model_folder, safetensors_bytes

CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "look", lambda: Sight(None))


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{\0}\0", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"metadata": {"total_size": 1e999}}', "has no weight_map"),
        (b'{"weight_map": {"w": 3}}', "weight_map has w in 3"),
        (b'{"weight_map": {"w": "../../etc/passwd"}}', "points outside its folder"),
        (b'{"weight_map": {"w": "model-1.safetensors", "v": "gone.safetensors"}}', "lacks the shard gone.safetensors"),
        (b'{"weight_map": {"v": "model-1.safetensors"}}', "lacks 1 tensors that the index names, such as v"),
        (b'{"weight_map": {"w\x1b[2J": 7}}', "weight_map has w"),
        (b'{"weight_map": {"\\u001b[2J": 7}}', "weight_map has \\x1b[2J in 7"),
        (b'{"weight_map": ' + b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_index_beside_the_config(cli: Cli, index: bytes, found: str) -> None:
    folder = model_folder(Path("model"))
    (folder / "config.json").write_text(json.dumps(CONFIGS["SmolLM2-135M"]))
    (folder / "model.safetensors").unlink()
    (folder / "model-1.safetensors").write_bytes(safetensors_bytes(["w"]))
    (folder / "model.safetensors.index.json").write_bytes(index)
    outcome = cli("plan", "--model", "model")
    assert (outcome.code, outcome.out) == (2, "")
    assert "\x1b" not in outcome.err
    assert found in outcome.err or "is not JSON" in outcome.err
    assert cli("train", "demo", "--set", "model.base=model").code == 2, "as the start does"


def test_an_index_without_its_shards_leaves_the_config(cli: Cli) -> None:
    """As after a download of the JSON files alone: enough to plan with."""
    folder = Path("model")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["SmolLM2-135M"]))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    assert cli("plan", "--model", "model", "--json").document["model"]["parameters"] == 134_515_008


@pytest.mark.parametrize("place", ["config.json", "folder"])
@pytest.mark.parametrize(
    ("quantised", "method", "note"),
    [
        ({"quant_method": "gptq", "bits": 4}, "qlora", "already quantised (gptq, 4 bit)"),
        ({"quant_method": "nvfp4"}, "lora", "already quantised (nvfp4, 4 bit)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "lora", "or take method qlora"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "qlora", "already quantised (bitsandbytes, 8 bit)"),
    ],
)
def test_a_base_that_is_quantised_already_is_said_and_refused_by_train(
    cli: Cli, home: Path, place: str, quantised: dict[str, Any], method: str, note: str
) -> None:
    folder = model_folder(Path("model"))
    config = {**CONFIGS["SmolLM2-135M"], "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(config))
    word = "model" if place == "folder" else "model/config.json"
    words = ("--model", word, "--method", method)
    document = cli("plan", *words, "--json").document
    assert note in document["notes"][0]
    assert document["model"]["quantisation"]["method"] == quantised["quant_method"]
    assert f"note: {document['notes'][0]}" in cli("plan", *words).out
    assert note in cli("fit", "demo", *words[:2], "--set", f"method={method}", "--gpu", "4090").out
    refused = cli("train", "demo", "--set", "model.base=model", "--method", method)
    assert (refused.code, refused.out) == (2, "")
    assert note in refused.err
    assert not list(home.glob("runs/*"))
    assert cli("measure", *words).code == 2


def test_four_bits_that_qlora_can_train_on_are_planned_as_they_lie(cli: Cli) -> None:
    said = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    Path("c.json").write_text(json.dumps({**CONFIGS["Llama-3.1-8B"], "quantization_config": said}))
    document = cli("plan", "--model", "c.json", "--method", "qlora", "--engine", "hf", "--json").document
    assert (document["setup"]["quant_type"], document["setup"]["double_quant"]) == ("fp4", False)
    assert "planned as it is, fp4" in document["notes"][0]


def test_a_gguf_file_is_said_to_be_none_to_train_on(cli: Cli) -> None:
    outcome = cli("plan", "--model", str(find_embedded().gguf), "--json")
    assert "a GGUF file, made to run models with" in outcome.document["notes"][0]
    assert outcome.document["model"]["parameters"] == 134_515_008
