"""`lora-studio doctor`: it looks, changes nothing, and says in its exit code whether a run could start."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.commands import doctor
from studio.core.calibration import Observation
from studio.probe import checkup
from studio.probe.cards import Card, CardProcess
from studio.probe.machine import Machine
from studio.probe.setting import setting_of
from studio.probe.torch_cards import TorchBuild
from studio.runs.calibration import remember
from studio.runs.job import write_job
from studio.runs.layout import new_run
from studio.runs.requests import ExportRequest
from tests.cli.conftest import Cli

GIB = 2**30
CARD = Card(
    0,
    "NVIDIA GeForce RTX 4090",
    "GPU-0",
    24 * GIB,
    2 * GIB,
    22 * GIB,
    (8, 9),
    processes=(CardProcess(1, "Xorg", GIB),),
)
CUDA_13 = TorchBuild("2.13.0", (13, 0), None, {(13, 0): frozenset({75, 86, 90}), (12, 6): frozenset({61, 75, 86})})
CPU_BUILD = TorchBuild("2.13.0+cpu")
SERVED: dict[str, Any] = {"driver": "580.95.05", "cuda": (13, 0)}
BARE = Machine(None, None, 16 * GIB, 8 * GIB, 10**11, 8, "Linux 6", False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the machine is said to have; a test changes it."""
    told: dict[str, Any] = {"machine": BARE, "torch": "2.13.0", "build": CUDA_13}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(checkup, "torch_build", lambda: told["build"])
    monkeypatch.setattr(doctor, "read_machine", lambda root: told["machine"])
    real = checkup.version

    def version(name: str) -> str:
        if name not in told:
            return real(name)
        if told[name] is None:
            raise checkup.PackageNotFoundError(name)
        return str(told[name])

    monkeypatch.setattr(checkup, "version", version)
    return told


def test_a_sound_machine_without_a_card(cli: Cli, machine: dict[str, Any], home: Path) -> None:
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.out
    assert "not available: no NVIDIA driver" in outcome.out
    assert "no finished run on this machine yet" in outcome.out
    assert "16.0 GiB, 8.0 free; 8 cores" in outcome.out
    assert not home.exists(), "looking makes no folder"


def test_the_document(cli: Cli, machine: dict[str, Any]) -> None:
    machine["machine"] = replace(BARE, cards=[CARD], **SERVED)
    document = cli("doctor", "--json").document
    assert document["ok"] is True
    names = [check["name"] for check in document["checks"]]
    for name in ("python", "torch", "peft", "bitsandbytes", "plotext", "card 0", "disk", "runs", "embedded model"):
        assert name in names
    card = next(check for check in document["checks"] if check["name"] == "card 0")
    assert card["found"] == "NVIDIA GeForce RTX 4090, 24.0 GiB, 22.0 free; 1 process(es) on it"
    assert document["machine"]["cards"][0]["processes"][0]["name"] == "Xorg"
    assert document["calibration"]["settings"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.9.1"}, "older than 2.10"),
        ({"peft": None}, "not installed"),
        ({"build": CPU_BUILD, "machine": replace(BARE, cards=[CARD])}, "built for CPUs"),
        (
            {"machine": replace(BARE, cards=[CARD], driver="560.35.03", cuda=(12, 6))},
            "a driver of version 580 or newer",
        ),
        ({"machine": replace(BARE, cards=[CARD], driver="560.35.03")}, "Update the driver"),
        ({"machine": replace(BARE, cards=[replace(CARD, capability=(6, 1))], **SERVED)}, "is too old for this torch"),
        ({"build": None}, "not installed"),
        ({"machine": replace(BARE, cards=[])}, "shows no card"),
        ({"machine": replace(BARE, disk_bytes=10**8)}, "a run needs 200 MB"),
    ],
)
def test_what_keeps_a_run_from_starting_is_exit_1(
    cli: Cli, machine: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    machine |= change
    outcome = cli("doctor")
    assert outcome.code == 1
    assert words in outcome.out
    assert "problem" in outcome.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cards": [replace(CARD, total_bytes=None, free_bytes=None)]}, "memory not available"),
        ({"cards": [replace(CARD, mig=True)]}, "MIG is on"),
        ({"cards": [replace(CARD, unified=True)]}, "main memory"),
        ({"cards": [replace(CARD, capability=(6, 1)), replace(CARD, index=1)], **SERVED}, "torch cannot use it"),
        ({"cards": [CARD], **SERVED}, "NVIDIA GeForce RTX 4090 (GPU-0)"),
        ({"cards": [CARD], "spills": True}, "spills into main memory"),
        ({"ram_bytes": None, "free_ram_bytes": None}, "not available"),
        ({"disk_bytes": None}, "free room not available"),
        ({"disk_bytes": 5 * 10**9}, "merged 7 B"),
    ],
)
def test_what_is_odd_is_said_and_stops_nothing(
    cli: Cli, machine: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    machine["machine"] = replace(BARE, **change)
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.out
    assert words in outcome.out


def test_a_place_that_cannot_be_written_is_a_problem(cli: Cli, machine: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    outcome = cli("doctor", "--runs-dir", str(file / "runs"))
    assert outcome.code == 1
    assert "cannot be written" in outcome.out


def test_the_hub_s_token_and_cache_are_looked_at_and_the_token_is_never_shown(
    cli: Cli, machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    blobs = tmp_path / "hub" / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "one").write_bytes(b"0" * 2 * 10**8)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = {check["name"]: check for check in cli("doctor", "--json").document["checks"]}
    assert found["hub token"]["verdict"] == "note"
    assert "gated ones (Llama, Gemma 1 to 3)" in found["hub token"]["advice"]
    assert found["hub cache"]["found"].startswith(f"1 model(s), 0.2 GB, in {tmp_path / 'hub'}; ")
    assert "hub" not in found
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_never_shown")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_never_shown")
    shown = cli("doctor", "--json")
    told = {check["name"]: check for check in shown.document["checks"]}
    assert told["hub token"]["found"] == "known, from HF_TOKEN; whether the hub accepts it is not asked"
    assert "offline mode is on" in told["hub"]["found"]
    assert "never_shown" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("environment", "columns", "encoding", "verdict", "found"),
    [
        (
            {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
            120,
            "utf-8",
            "ok",
            "120 x 24, 16 million colours",
        ),
        ({"TERM": "tmux-256color", "TMUX": "x", "SSH_CONNECTION": "y"}, 80, "UTF-8", "ok", "in tmux, over SSH"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, 80, "utf-8", "ok", "no colours (NO_COLOR)"),
        ({"TERM": "linux"}, 72, "utf-8", "note", "72 x 24, 16 colours, linux"),
        ({"TERM": "xterm-256color"}, 80, "ascii", "note", "256 colours, xterm-256color, ascii"),
        ({"TERM": "dumb"}, 80, "utf-8", "note", "dumb"),
    ],
)
def test_what_the_terminal_can_show(
    environment: dict[str, str], columns: int, encoding: str, verdict: str, found: str
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    size, stream = os.terminal_size((columns, 24)), Terminal(io.BytesIO(), encoding=encoding)
    check = checkup.terminal_check(environment, size, stream)
    assert check.verdict == verdict
    assert found in check.found
    assert bool(check.advice) == (verdict == "note")
    assert "none here" in checkup.terminal_check(environment, size, io.StringIO()).found


def test_what_a_killed_export_left_is_listed_with_the_way_out(
    cli: Cli, machine: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    run = new_run(home / "runs", "export-q8_0-mine", 1_750_000_000.0)
    write_job(run, ExportRequest("/adapter", str(tmp_path / "mine"), "q8_0"))
    (tmp_path / ".merged-for-mine").mkdir()
    (tmp_path / ".merged-for-mine" / "weights").write_bytes(bytes(20_000_000))
    os.utime(run.root, (0, 0))  # long since begun: no process is about to take it
    outcome = cli("doctor")
    assert outcome.code == 0, outcome.out
    assert f"0.02 GB in {tmp_path}/.merged-for-mine, of {run.name}" in " ".join(outcome.out.split())
    assert f"left over: go on with lora-studio runs resume {run.name}" in outcome.out
    assert cli("runs", "rm", run.name).code == 0
    assert not (tmp_path / ".merged-for-mine").exists()
    assert "left over" not in cli("doctor").out


def test_the_error_of_the_estimate_so_far(cli: Cli, machine: dict[str, Any]) -> None:
    setting = setting_of("NVIDIA GeForce RTX 4090", "qlora")
    remember(Observation("a", 1.0, setting, (10 * GIB, 11 * GIB, 12 * GIB), 8 * GIB, 11 * GIB, 12 * GIB))
    outcome = cli("doctor")
    assert "RTX 4090" in outcome.out
    assert "+25.0%" in outcome.out
    (found,) = cli("doctor", "--json").document["calibration"]["settings"]
    assert found["errors"]["tensors"] == {"median": 0.25, "worst": 0.25}
    assert found["runs"] == 1


def test_a_broken_calibration_is_no_problem(cli: Cli, machine: dict[str, Any], home: Path) -> None:
    home.mkdir()
    (home / "calibration.json").write_bytes(b"\xff\x00")
    assert cli("doctor").code == 0


def test_imports_happen_in_a_process_of_their_own(
    cli: Cli, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        0: json.dumps({"torch": "2.13", "cuda": "12.8", "cards": ["RTX 4090"], "bf16": True}),
        1: "",
    }
    for code, stdout in answers.items():
        done = subprocess.CompletedProcess([], code, f"noise\n{stdout}", "Traceback\nImportError: libcudart \x1b[2J")
        monkeypatch.setattr(checkup.subprocess, "run", lambda *words, **how: done)  # noqa: B023  used at once
        outcome = cli("doctor", "--imports", "--json")
        assert outcome.code == code
        check = outcome.document["checks"][-1]
        assert check["name"] == "imports"
        assert "1 card(s)" in check["found"] if code == 0 else "ImportError" in check["found"]
        assert "\x1b" not in check["found"]


def test_a_card_that_only_the_driver_sees_is_a_problem_in_torch_s_own_words(
    cli: Cli, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, str]] = []
    seen = {"torch": "2.13", "cuda": "13.0", "cards": [], "why": "The NVIDIA driver on your system is too old \x1b[2J"}

    def run(*words: Any, env: dict[str, str], **how: Any) -> Any:
        asked.append(env)
        return subprocess.CompletedProcess([], 0, json.dumps(seen), "")

    monkeypatch.setattr(checkup.subprocess, "run", run)
    machine["machine"] = replace(BARE, cards=[CARD], **SERVED)
    outcome = cli("doctor", "--imports", "--json")
    assert outcome.code == 1
    check = outcome.document["checks"][-1]
    assert "torch does not see NVIDIA GeForce RTX 4090" in check["found"]
    assert "too old" in check["found"]
    assert "\x1b" not in check["found"]
    assert asked[0]["CUDA_VISIBLE_DEVICES"] == "GPU-0", "it looks as a job would"


def test_where_runs_go_under_a_mask(cli: Cli, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["machine"] = replace(BARE, cards=[CARD], **SERVED)
    for mask, code, words in (("", 0, "the CPU under CUDA_VISIBLE_DEVICES=''"), ("5", 1, "names no card")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        outcome = cli("doctor")
        assert (outcome.code, words in outcome.out) == (code, True), outcome.out


def test_it_imports_nothing_heavy_itself(home: Path) -> None:
    script = (
        "import sys; from studio.cli import main; main(['doctor', '--json']); "
        "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["checks"]
