"""`lora-studio merge`: what it asks the job for, and what it refuses before there is a job."""

import shutil
from pathlib import Path

import pytest

from studio.commands.merge import checked_lines
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from tests.cli.conftest import Cli


def _asked(document: dict[str, str]) -> MergeRequest:
    request = read_job(RunPaths(Path(document["path"])), MergeRequest)
    assert isinstance(request, MergeRequest)
    return request


@pytest.mark.parametrize(("words", "onto"), [((), "original"), (("--onto", "dequantized"), "dequantized")])
def test_what_it_is_merged_onto(cli: Cli, recipe: Path, tmp_path: Path, words: tuple[str, ...], onto: str) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("merge", run, "--out", str(tmp_path / "out"), *words, "--json")
    assert outcome.code == 0, outcome.err
    assert _asked(outcome.document).onto == onto


@pytest.mark.parametrize(
    ("method", "onto", "told"), [("lora", "dequantized", 1), ("lora", "original", 0), ("qlora", "dequantized", 0)]
)
def test_an_adapter_of_a_16_bit_base_wins_nothing_on_dequantized_weights(
    cli: Cli, recipe: Path, tmp_path: Path, method: str, onto: str, told: int
) -> None:
    run = cli("train", str(recipe), "--set", f"method={method}", "--json").document["run"]
    outcome = cli("merge", run, "--out", str(tmp_path / "out"), "--onto", onto, "--json")
    assert outcome.code == 0
    assert outcome.err.count("was trained on the 16-bit base") == told
    assert outcome.document["status"] == "finished"


@pytest.mark.parametrize("word", ["4bit", "nf4", "NF4", "quantized"])
def test_four_bits_are_refused_with_the_reason_and_the_way(cli: Cli, recipe: Path, tmp_path: Path, word: str) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("merge", run, "--out", str(tmp_path / "out"), "--onto", word)
    assert outcome.code == 2
    assert "would erase most of what was trained" in outcome.err
    assert "then quantise the merged model" in " ".join(outcome.err.split())


def test_an_unknown_word(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("merge", run, "--out", str(tmp_path / "out"), "--onto", "sideways")
    assert outcome.code == 2
    assert "original, dequantized" in outcome.err


def test_an_adapter_folder_inside_its_run_knows_the_run(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    path = Path(cli("train", str(recipe), "--json").document["path"])
    words = ("--base", "embedded", "--json")
    inside = cli("merge", str(path / "adapter"), "--out", str(tmp_path / "out"), *words).document
    assert _asked(inside).run == str(path)
    shutil.copytree(path / "adapter", tmp_path / "copied")
    outside = cli("merge", str(tmp_path / "copied"), "--out", str(tmp_path / "out-2"), *words).document
    assert _asked(outside).run == ""


def test_several_adapters_with_weights(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    first, second = (Path(cli("train", str(recipe), "--json").document["path"]) for _ in range(2))
    words = ("--weight", "0.7", "--adapter", f"{second.name}=-0.3", "--adapter", str(second / "adapter"))
    outcome = cli("merge", first.name, "--out", str(tmp_path / "out"), *words, "--json")
    assert outcome.code == 0, outcome.err
    adapter = str(second / "adapter")
    assert _asked(outcome.document).weighted == ((str(first / "adapter"), 0.7), (adapter, -0.3), (adapter, 1.0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--adapter", "nowhere=0.5"), "nowhere"),
        (("--adapter", "RUN=much"), "wanted a number"),
        (("--weight", "nan"), "wanted a number"),
        (("--checkpoint", "7"), "there is no checkpoint 7; there are"),
    ],
)
def test_adapters_and_checkpoints_that_are_not_there(
    cli: Cli, recipe: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("merge", run, "--out", str(tmp_path / "out"), *(word.replace("RUN", run) for word in words))
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


def test_what_the_checks_found_is_said() -> None:
    report = {
        "closeness": {"tokens": 56, "mean_kl": 0.00012, "same_top_token": 0.982},
        "recomputed_tensors": 8,
        "tensors": 272,
        "side_by_side": [{"prompt": "Who?\x1b[2J", "separate": "me", "merged": "I"}],
    }
    said = checked_lines(report)
    assert "KL 0.00012" in said[0]
    assert said[1] == "all 272 tensors read back, 8 made again by peft: every bit equal"
    assert said[2:] == ["asked: Who?\\x1b[2J", "  base + adapter me", "  merged         I"]
    assert checked_lines({"closeness": None, "side_by_side": []}) == []
