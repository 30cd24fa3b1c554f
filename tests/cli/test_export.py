"""`lora-studio export`: what it asks the job for, and what it refuses before there is a job."""

import json
import shutil
from pathlib import Path

import pytest

from studio.runs.job import ExportRequest, read_job
from studio.runs.layout import RunPaths
from tests.cli.conftest import Cli


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A folder that looks like a whole model."""
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return folder


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_merged_folder_is_exported(cli: Cli, merged: Path, tmp_path: Path, form: str) -> None:
    outcome = cli("export", str(merged), "--format", form, "--out", str(tmp_path / "out"), "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert (document["job"], document["status"], document["out"]) == ("export", "finished", str(tmp_path / "out"))
    assert document["run"].startswith(f"export-{form}-merged-20")
    assert read_job(RunPaths(Path(document["path"]))) == ExportRequest(str(merged), str(tmp_path / "out"), form)


def test_a_merge_run_names_its_model(cli: Cli, recipe: Path, merged: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    out = tmp_path / "from-run"
    merge = cli("merge", run, "--out", str(out), "--json").document["run"]
    shutil.rmtree(out)
    shutil.copytree(merged, out)
    outcome = cli("export", merge, "--format", "nf4", "--out", str(tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert f"exported model: {tmp_path / 'out'}" in outcome.out
    refused = cli("export", run, "--format", "nf4", "--out", str(tmp_path / "out-2"))
    assert refused.code == 2
    assert f"lora-studio merge {run} --out DIR" in " ".join(refused.err.split())


def test_what_is_refused(cli: Cli, home: Path, merged: Path, tmp_path: Path) -> None:
    runs = list(home.glob("runs/*"))
    out = str(tmp_path / "out")
    assert cli("export", str(merged), "--format", "q2", "--out", out).code == 2
    assert cli("export", str(tmp_path / "gone"), "--format", "nf4", "--out", out).code == 2
    full = cli("export", str(merged), "--format", "nf4", "--out", str(merged))
    assert (full.code, "not empty" in full.err) == (2, True)
    (merged / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    again = cli("export", str(merged), "--format", "nf4", "--out", out)
    assert (again.code, "quantised already" in again.err) == (2, True)
    (merged / "model.safetensors").write_bytes(b"")
    broken = cli("export", str(merged), "--format", "nf4", "--out", out)
    assert broken.code == 2
    assert list(home.glob("runs/*")) == runs
    assert not Path(out).exists()


def test_a_run_names_its_adapter(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document
    outcome = cli("export", run["run"], "--format", "peft", "--out", str(tmp_path / "out"), "--json")
    assert outcome.code == 0, outcome.err
    adapter = str(Path(run["path"]) / "adapter")
    asked = read_job(RunPaths(Path(outcome.document["path"])))
    assert asked == ExportRequest(adapter, str(tmp_path / "out"), "peft", run["path"])
    assert cli("export", str(tmp_path), "--format", "peft", "--out", str(tmp_path / "out-2")).code == 2
