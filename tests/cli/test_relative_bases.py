"""A model folder named from where the user stands: its job runs in another folder and must find the same one."""

import json
from pathlib import Path

import pytest

from studio.core.recipe import EMBEDDED
from studio.probe.chat import chat_request
from studio.probe.models import word_anywhere
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest, ExportRequest, MergeRequest
from tests.cli.conftest import Cli
from tests.fakes.model import model_folder, safetensors_bytes


@pytest.fixture
def base(home: Path) -> Path:
    """A model in the current folder."""
    return model_folder(Path("base").absolute())


@pytest.fixture
def adapter(base: Path) -> Path:
    """An adapter that names its base as it was named in training there."""
    folder = base.parent / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(["base_model.lora_A.weight"]))
    return folder


@pytest.mark.parametrize("words", [("--base", "base"), ()])
@pytest.mark.parametrize("verb", [("merge",), ("export", "--format", "q8_0")])
def test_what_an_adapter_is_merged_into(
    cli: Cli, base: Path, adapter: Path, words: tuple[str, ...], verb: tuple[str, ...]
) -> None:
    outcome = cli(verb[0], "adapter", *verb[1:], *words, "--out", "out", "--json")
    assert outcome.code == 0, outcome.err
    paths = RunPaths(Path(outcome.document["path"]))
    request = read_job(paths, MergeRequest) or read_job(paths, ExportRequest)
    assert request
    assert request.base == str(base)


def test_the_base_of_a_run(cli: Cli, recipe: Path, base: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("merge", run, "--base", "base", "--out", "out", "--json")
    assert outcome.code == 0, outcome.err
    request = read_job(RunPaths(Path(outcome.document["path"])), MergeRequest)
    assert request
    assert request.base == str(base)


def test_what_is_audited(cli: Cli, recipe: Path, base: Path) -> None:
    outcome = cli("audit", "base", "--model", "./base", "--data", "rows.jsonl", "--json")
    assert outcome.code == 0, outcome.err
    request = read_job(RunPaths(Path(outcome.document["path"])), AuditRequest)
    assert request
    assert request.model == str(base)


def test_what_is_asked_in_a_chat(base: Path, adapter: Path, home: Path) -> None:
    assert chat_request("base", home).base == str(base)
    assert chat_request("base", home, base="base").beside == str(base)
    assert chat_request("adapter", home).base == str(base)


@pytest.mark.parametrize("word", ["", EMBEDDED, "owner/name", "base\0", "x" * 5000, "~nobody-by-this-name/base"])
def test_other_words_stay_as_they_are(base: Path, word: str) -> None:
    model_folder(base.parent / EMBEDDED)
    assert word_anywhere(word) == word


def test_an_output_that_is_a_link_is_refused_before_there_is_a_run(cli: Cli, adapter: Path, home: Path) -> None:
    Path("out").symlink_to("elsewhere")
    outcome = cli("merge", "adapter", "--out", "out")
    assert (outcome.code, "symbolic link" in outcome.err) == (2, True)
    assert not list(home.glob("runs/*"))
