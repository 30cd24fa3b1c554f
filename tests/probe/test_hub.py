"""Hub ids, against a stand-in for the hub on this machine: each case in a process of its own, as the client reads its
settings when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import COMMIT, hub
from tests.fakes.model import CONFIG, model_folder

ASK = """
import json, sys
from studio.core.errors import BadInput
from studio.probe.hub_transfer import download
from studio.probe.models import find_base
try:
    told = []
    if "download" in sys.argv:
        download("owner/tiny", "", int(sys.argv[3]), told.append)
    base = find_base("owner/tiny", sys.argv[1])
    found = {"kind": base.kind, "path": str(base.path), "size": base.size_bytes, "config": base.config}
    print(json.dumps(found | {"told": told}))
except BadInput as error:
    print(json.dumps({"error": str(error)}))
"""


def ask(tmp_path: Path, *arguments: str, endpoint: str = "http://127.0.0.1:9", offline: bool = False) -> dict[str, Any]:
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", ASK, *(arguments or ("",))]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = model_folder(tmp_path / "repository")
    (folder / "README.md").write_text("nothing that training needs")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that must stay where it is")
    return folder


def test_looking_downloads_the_config_alone(tmp_path: Path, repository: Path) -> None:
    with hub("owner/tiny", repository) as (endpoint, asked):
        found = ask(tmp_path, endpoint=endpoint)
    assert found["kind"] == "hub"
    assert found["path"] == "None"
    assert found["config"]["model_type"] == "llama"
    assert found["size"] == (repository / "model.safetensors").stat().st_size
    fetched = {request.rsplit("/", 1)[1] for request in asked if request.startswith("GET") and "/resolve/" in request}
    assert fetched == {"config.json"}


def test_a_base_that_is_quantised_already_is_refused_before_it_is_downloaded(tmp_path: Path, repository: Path) -> None:
    said = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (repository / "config.json").write_text(json.dumps({**CONFIG, **said}))
    home = {"LORA_STUDIO_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "studio", "train", "demo", "--set", "model.base=owner/tiny"]
    with hub("owner/tiny", repository) as (endpoint, asked):
        settings = os.environ | home | {"HF_ENDPOINT": endpoint}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "owner/tiny is already quantised (gptq, 4 bit)" in done.stderr
    assert not (tmp_path / "home" / "runs").exists()
    fetched = {request.rsplit("/", 1)[1] for request in asked if request.startswith("GET") and "/resolve/" in request}
    assert fetched == {"config.json"}


def test_a_downloaded_model_is_found_offline_and_pickles_stay_on_the_hub(tmp_path: Path, repository: Path) -> None:
    with hub("owner/tiny", repository) as (endpoint, asked):
        found = ask(tmp_path, "", "download", "0", endpoint=endpoint)
    assert Path(found["path"]).name == COMMIT
    assert not any(".bin" in request and "/resolve/" in request for request in asked)
    told = found.pop("told")
    assert told == sorted(set(told))
    assert told[-1] >= found["size"] > 0
    again = ask(tmp_path, offline=True)
    assert again.pop("told") == []
    assert again == found


def test_a_model_larger_than_the_disk_is_not_begun(tmp_path: Path, repository: Path) -> None:
    with hub("owner/tiny", repository) as (endpoint, asked):
        message = ask(tmp_path, "", "download", str(10**17), endpoint=endpoint)["error"]
    assert "100000000.0 GB more on the disk" in message
    assert "HF_HOME" in message
    assert not any("/resolve/" in request for request in asked)


def test_a_damaged_cache_is_said_not_downloaded_over(tmp_path: Path, repository: Path) -> None:
    with hub("owner/tiny", repository) as (endpoint, asked):
        found = ask(tmp_path, "", "download", "0", endpoint=endpoint)
        weights = Path(found["path"]) / "model.safetensors"
        weights.resolve().write_bytes(weights.read_bytes()[:-5])
        asked.clear()
        message = ask(tmp_path, endpoint=endpoint)["error"]
    assert "corrupt or truncated" in message
    assert "hf cache rm model/owner/tiny" in message
    assert not any("/resolve/" in request for request in asked)


def test_offline_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    message = ask(tmp_path, offline=True)["error"]
    assert f"it is not in the cache {tmp_path / 'hf' / 'hub'}" in message
    assert "offline mode is on" in message
    assert "hf download owner/tiny --local-dir FOLDER" in message


def test_no_connection(tmp_path: Path) -> None:
    message = ask(tmp_path)["error"]
    assert "the hub cannot be asked (ConnectError" in message or "Connection" in message


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "is not on the hub, or it is private"),
        (401, "RepoNotFound", "hf auth login"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (404, "RevisionNotFound", "not this revision"),
        (500, "", "the hub cannot be asked"),
    ],
)
def test_refusals_of_the_hub(tmp_path: Path, repository: Path, status: int, code: str, expected: str) -> None:
    with hub("owner/tiny", repository, status=status, error_code=code) as (endpoint, _):
        assert expected in ask(tmp_path, "v2", endpoint=endpoint)["error"]


def test_a_token_that_the_hub_does_not_accept_is_said_to_be_that(tmp_path: Path, repository: Path) -> None:
    message = "Invalid credentials in Authorization header"
    with hub("owner/tiny", repository, status=401, error_message=message) as (endpoint, _):
        found = ask(tmp_path, endpoint=endpoint)["error"]
    assert "the hub does not accept the token of this computer (HTTP 401)" in found
    assert "hf auth login again" in found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "only as pickles (pytorch_model.bin)"),
    ],
)
def test_repositories_without_what_training_needs(tmp_path: Path, repository: Path, name: str, expected: str) -> None:
    (repository / name).unlink()
    with hub("owner/tiny", repository) as (endpoint, _):
        message = ask(tmp_path, endpoint=endpoint)["error"]
    assert message.startswith("The hub's owner/tiny")
    assert expected in message
