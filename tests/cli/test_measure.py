"""`lora-studio measure` as its user meets it, with a fake job; one test traces for real."""

import json
from pathlib import Path

import pytest

from studio.cli import main
from tests.cli.conftest import Cli

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
}


@pytest.fixture
def config(home: Path) -> Path:
    path = home.parent / "here" / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_table_by_stage_and_component_with_the_estimate_beside_it(cli: Cli, config: Path) -> None:
    told = cli("measure", "--model", "config.json", "--seq", "64")
    assert told.code == 0
    lines = told.out.splitlines()
    head = next(line for line in lines if line.startswith("stage "))
    assert head.split() == ["stage", "base", "activations", "in", "all", "estimate", "difference"]
    assert next(line for line in lines if line.startswith("backward ")).split()[1:7] == [
        "1.0",
        "GiB",
        "512.0",
        "MiB",
        "1.5",
        "GiB",
    ]
    assert "peak in stage backward: 1.5 GiB of tensors; the estimate is" in told.out
    assert told.out.count("not known: ") >= 3


def test_json_has_the_fields_of_a_plan(cli: Cli, config: Path) -> None:
    flags = ("--model", "config.json", "--seq", "64", "--json")
    plan, measured = cli("plan", *flags).document, cli("measure", *flags).document
    assert {"peak_bytes", "components", "stage", "fits", "reserved_bytes"} <= plan.keys()
    assert plan.keys() <= measured.keys()
    assert measured["tokens_per_second_unknown"] == plan["tokens_per_second_unknown"]
    assert measured["peak_bytes"] == 3 * 2**29
    assert measured["source"] == "trace"
    assert measured["unknown"]


def test_it_fits_a_card_or_not(cli: Cli, config: Path) -> None:
    assert cli("measure", "--model", "config.json", "--gpu", "4090").code == 0
    small = cli("measure", "--model", "config.json", "--vram-gib", "1")
    assert small.code == 1
    assert "does not fit" in small.out


def test_a_named_card_is_traced_with_its_capability(cli: Cli, config: Path, home: Path) -> None:
    told = cli("measure", "--model", "config.json", "--gpu", "t4", "--json")
    report = json.loads((home / "runs" / told.document["run"] / "report.json").read_text())
    assert (report["asked"], report["capability"], report["device"]) == ("trace", [7, 5], "cuda")


def test_a_recipe_for_the_cpu_is_traced_for_the_cpu(cli: Cli, config: Path, home: Path) -> None:
    told = cli("measure", "--model", "config.json", "--set", "device.device=cpu", "--json")
    report = json.loads((home / "runs" / told.document["run"] / "report.json").read_text())
    assert report["device"] == "cpu"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "hf"], "own step"),
        (["--model", "nowhere.json"], "nowhere.json"),
        (["--rank", "100000"], "rank"),
        (["--targets", "nothing_proj"], "nothing_proj"),
        (["--gpu", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_run_is_made(
    cli: Cli, config: Path, home: Path, words: list[str], message: str
) -> None:
    told = cli("measure", "--model", "config.json", *words)
    assert told.code == 2
    assert message in told.err
    assert not list(home.glob("runs/*"))


def test_a_failed_job_is_told(cli: Cli, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MEASURE_FAILS", "1")
    told = cli("measure", "--model", "config.json", "--json")
    assert told.code == 1
    assert "values decide" in told.err
    assert told.document["failure"]["kind"] == "not_traceable"


@pytest.mark.slow
def test_a_real_trace(home: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--model", str(config), "--seq", "64", "--trace", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert abs(document["estimate"]["difference"]) < 0.02
    assert document["stages"].keys() == {"load", "forward", "loss", "backward", "optimizer", "eval"}
