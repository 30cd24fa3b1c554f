"""`lora-studio export`: what it asks the job for, and what it refuses before there is a job."""

import json
import shutil
import time
from pathlib import Path

import pytest

from studio.runs.chain import next_run
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from studio.runs.status import run_status
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
    assert read_job(RunPaths(Path(document["path"])), ExportRequest) == ExportRequest(
        str(merged), str(tmp_path / "out"), form
    )


def test_a_merge_run_names_its_model(cli: Cli, recipe: Path, merged: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    out = tmp_path / "from-run"
    merge = cli("merge", run, "--out", str(out), "--json").document["run"]
    shutil.rmtree(out)
    shutil.copytree(merged, out)
    outcome = cli("export", merge, "--format", "nf4", "--out", str(tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert f"exported model: {tmp_path / 'out'}" in outcome.out
    folder = cli("export", str(out), "--format", "nf4", "--out", str(tmp_path / "two"), "--json").document
    asked = read_job(RunPaths(Path(folder["path"])), ExportRequest)
    assert asked is not None and Path(asked.run).name == run, "the folder alone tells which training it is of"


def test_exports_follow_a_merge_by_themselves(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXPORT_FAILS", "q8_0")
    run, out = cli("train", str(recipe), "--json").document["run"], tmp_path / "out"
    words = ("--export", "q8_0", "--export", "int8", "--export", "q8_0", "--json")
    merge = cli("merge", run, "--out", str(out), *words).document
    paths, seen = RunPaths(Path(merge["path"])), []
    deadline = time.monotonic() + 60
    while len(seen) < 2 or run_status(seen[-1]).live:
        assert time.monotonic() < deadline, paths.output.read_text()
        if following := next_run(seen[-1] if seen else paths):
            seen.append(following)
        time.sleep(0.05)
    asked = [read_job(one, ExportRequest) for one in seen]
    trained = str(Path(merge["path"]).parent / run)
    assert asked == [
        ExportRequest(str(out), f"{out}-q8_0", "q8_0", trained, then=("int8",)),
        ExportRequest(str(out), f"{out}-int8", "int8", trained),
    ]
    assert [str(run_status(one)) for one in seen] == ["failed", "finished"]
    assert (tmp_path / "out-int8").is_dir()


def test_a_chain_that_cannot_be_is_refused_before_the_merge(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    run, out = cli("train", str(recipe), "--json").document["run"], str(tmp_path / "out")
    (tmp_path / "out-int8").mkdir()
    (tmp_path / "out-int8" / "mine").touch()
    for words, said in (
        (("--export", "int8"), "already exists"),
        (("--onto", "dequantized", "--export", "nf4"), "values of 4-bit weights"),
        (("--export", "peft"), "invalid choice"),
    ):
        refused = cli("merge", run, "--out", out, *words)
        assert refused.code == 2
        assert said in refused.err
    assert not Path(out).exists()


def test_what_is_refused(cli: Cli, home: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.probe.export.knows_token", lambda: False)
    runs = list(home.glob("runs/*"))
    out = str(tmp_path / "out")
    assert cli("export", str(merged), "--format", "q2", "--out", out).code == 2
    assert cli("export", str(tmp_path / "gone"), "--format", "nf4", "--out", out).code == 2
    full = cli("export", str(merged), "--format", "nf4", "--out", str(merged))
    assert (full.code, "not empty" in full.err) == (2, True)
    for words, said in (
        ((str(merged), "peft", out), "a format of adapters"),
        ((str(merged), "nf4", ""), "--out is empty"),
        ((str(merged), "nf4", f"{out}\x1b[31m"), "control characters"),
        ((str(merged), "nf4", str(merged / "config.json" / "x")), "cannot be"),
        ((str(merged), "nf4", out, "--push", "me/mine"), "hf auth login"),
    ):
        word, form, place, *more = words
        refused = cli("export", word, "--format", form, "--out", place, *more)
        assert (refused.code, said in refused.err, "\x1b" in refused.err) == (2, True, False), refused.err
    (merged / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    again = cli("export", str(merged), "--format", "nf4", "--out", out)
    assert (again.code, "quantised already" in again.err) == (2, True)
    (merged / "model.safetensors").write_bytes(b"")
    broken = cli("export", str(merged), "--format", "nf4", "--out", out)
    assert broken.code == 2
    assert list(home.glob("runs/*")) == runs
    assert not Path(out).exists()


@pytest.mark.parametrize("form", ["peft", "lora-gguf", "int8", "q4_k_m"])
def test_a_run_names_its_adapter_for_every_format(
    cli: Cli, recipe: Path, merged: Path, tmp_path: Path, form: str
) -> None:
    run = cli("train", str(recipe), "--json").document
    words = ("--out", str(tmp_path / "out"), "--base", str(merged), "--onto", "dequantized", "--json")
    outcome = cli("export", run["run"], "--format", form, *words)
    assert outcome.code == 0, outcome.err
    adapter = str(Path(run["path"]) / "adapter")
    asked = read_job(RunPaths(Path(outcome.document["path"])), ExportRequest)
    wanted = ExportRequest(adapter, str(tmp_path / "out"), form, run["path"], str(merged), onto="dequantized")
    assert asked == wanted
    assert outcome.document["run"].startswith(f"export-{form}-mine-20")


def test_four_bits_twice_are_refused_with_the_reason(cli: Cli, recipe: Path, merged: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    words = ("--out", str(tmp_path / "out"), "--base", str(merged), "--onto", "dequantized")
    refused = cli("export", run, "--format", "nf4", *words)
    assert (refused.code, "KL 1.99" in refused.err) == (2, True)


def test_an_adapter_is_wanted_where_only_an_adapter_will_do(cli: Cli, merged: Path, tmp_path: Path) -> None:
    for form in ("peft", "lora-gguf"):
        assert cli("export", str(merged), "--format", form, "--out", str(tmp_path / "out")).code == 2


def test_one_file_is_for_gguf_formats(cli: Cli, merged: Path, tmp_path: Path) -> None:
    refused = cli("export", str(merged), "--format", "nf4", "--out", str(tmp_path / "one.gguf"))
    assert (refused.code, "is a folder" in refused.err) == (2, True)
    assert cli("export", str(merged), "--format", "Q8_0", "--out", str(tmp_path / "one.gguf")).code == 0


def test_what_was_checked_is_said_at_the_end(cli: Cli, merged: Path, tmp_path: Path) -> None:
    outcome = cli("export", str(merged), "--format", "q8_0", "--out", str(tmp_path / "out"))
    assert "tokens: 5 conversations read the same in training" in outcome.out
    assert "KL 0.0069 nats a token" in outcome.out
    assert "97.5% of 282 tokens" in outcome.out
    quiet = cli("export", str(merged), "--format", "q8_0", "--out", str(tmp_path / "two"), "--json")
    assert quiet.document["result"]["golden"]["conversations"] == 5


def test_a_repository_to_push_to(cli: Cli, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio.probe.export.knows_token", lambda: True)
    words = ("--format", "q8_0", "--out", str(tmp_path / "out"), "--push", "me/tuned", "--json")
    asked = read_job(RunPaths(Path(cli("export", str(merged), *words).document["path"])), ExportRequest)
    assert isinstance(asked, ExportRequest)
    assert asked.push == "me/tuned"
    refused = cli("export", str(merged), "--format", "q8_0", "--out", str(tmp_path / "out-2"), "--push", "tuned")
    assert (refused.code, "OWNER/NAME" in refused.err) == (2, True)
