"""The shape of a hub model before it is downloaded, against a stand-in for the hub: config and headers alone."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.probe.hub import hub_headers
from studio.probe.safetensors_file import CorruptSafetensors
from tests.fakes.hub import hub

ASK = """
import json
from studio.core.errors import BadInput
from studio.probe.shape import find_shape
try:
    shape = find_shape("owner/tiny")
    print(json.dumps({"parameters": shape.parameters, "doubts": shape.doubts}))
except BadInput as error:
    print(json.dumps({"error": str(error)}))
"""
CHECK = """
import json
from studio.probe.model_check import check_model
print(json.dumps(check_model("owner/tiny")))
"""
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
PARAMETERS = 2 * 1000 * 1024 + 4 * 1024**2 + 3 * 1024 * 2048 + 3 * 1024


def ask(tmp_path: Path, endpoint: str, script: str = ASK) -> dict[str, Any]:
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "", "no progress bar"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def weights(path: Path, header: dict[str, Any] | bytes, buffer_bytes: int) -> None:
    """Write a safetensors file whose buffer is a hole in the disk."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + buffer_bytes)


def talk_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of this process, which has read its settings already, ask an endpoint."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def bf16(parameters: int) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 2 * parameters]}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    weights(folder / "model.safetensors", {"w": bf16(PARAMETERS)}, 2 * PARAMETERS)
    return folder


def test_headers_are_fetched_and_no_weight_is(tmp_path: Path, repository: Path) -> None:
    with hub("owner/tiny", repository) as (endpoint, asked):
        assert ask(tmp_path, endpoint) == {"parameters": PARAMETERS, "doubts": []}
    fetched = [request for request in asked if request.startswith("GET") and ".safetensors" in request]
    assert len(fetched) == 1
    assert fetched[0].endswith("bytes=0-100000")


def test_a_model_is_checked_without_a_weight(tmp_path: Path, repository: Path) -> None:
    names = {"model.embed_tokens.weight": 3000, "model.layers.0.mlp.up_proj.weight": 4000, "mtp.norm.weight": 50}
    begins = [0, 3000, 7000]
    header = {
        name: {"dtype": "BF16", "shape": [many], "data_offsets": [2 * begin, 2 * (begin + many)]}
        for (name, many), begin in zip(names.items(), begins, strict=True)
    }
    weights(repository / "model.safetensors", header, 2 * 7050)
    with hub("owner/tiny", repository) as (endpoint, asked):
        seen = ask(tmp_path, endpoint, CHECK)
    assert (seen["kind"], seen["class_used"], seen["problems"]) == ("hub", "LlamaForCausalLM", [])
    assert seen["trains"]["bytes"] == 14_000
    assert seen["trains"]["left_out"] == [{"name": "mtp", "bytes": 100}]
    assert seen["template"]["trouble"].startswith("not known")
    fetched = [request for request in asked if request.startswith("GET") and ".safetensors" in request]
    assert all("bytes=0-" in request for request in fetched)
    weights(repository / "model.safetensors", b"{{{", 8)
    with hub("owner/tiny", repository) as (endpoint, _):
        assert "corrupt" in ask(tmp_path, endpoint, CHECK)["problems"][0]


def test_shards_are_added_up_and_contradict_the_config(tmp_path: Path, repository: Path) -> None:
    (repository / "model.safetensors").unlink()
    (repository / "model.safetensors.index.json").write_text("{}")
    for part in (1, 2):
        weights(repository / f"model-0000{part}-of-00002.safetensors", {"w": bf16(PARAMETERS)}, 2 * PARAMETERS)
    weights(repository / "consolidated.safetensors", {"w": bf16(PARAMETERS)}, 2 * PARAMETERS)
    with hub("owner/tiny", repository) as (endpoint, _):
        found = ask(tmp_path, endpoint)
    assert found["parameters"] == 2 * PARAMETERS
    assert f"its weights are {2 * PARAMETERS:,}" in found["doubts"][0]


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}},
        {"w": {"dtype": "BF16", "shape": [2**62, 2**62], "data_offsets": [0, 2]}},
        {"w": {"dtype": "BF16", "shape": "x", "data_offsets": None}},
        {"w": bf16(10**15)},
        {"a": bf16(4), "b": bf16(4)},
        b"{{{",
        b"[" * 20_000,
        b"\xff\xfe",
    ],
)
def test_a_hostile_header_is_refused(
    repository: Path, header: dict[str, Any] | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights(repository / "model.safetensors", header, 64)
    with hub("owner/tiny", repository) as (endpoint, _):
        talk_to(endpoint, monkeypatch)
        with pytest.raises(CorruptSafetensors, match=r"model\.safetensors is corrupt or truncated"):
            hub_headers("owner/tiny", "")


def test_a_header_longer_than_the_file_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with hub("owner/tiny", repository) as (endpoint, _):
        talk_to(endpoint, monkeypatch)
        with pytest.raises(CorruptSafetensors):
            hub_headers("owner/tiny", "")


def test_a_hub_that_does_not_answer_gives_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    talk_to("http://127.0.0.1:9", monkeypatch)
    assert hub_headers("owner/tiny", "") is None


def test_without_a_connection_it_says_what_to_do(tmp_path: Path) -> None:
    assert "hf download owner/tiny --local-dir FOLDER" in ask(tmp_path, "http://127.0.0.1:9")["error"]
