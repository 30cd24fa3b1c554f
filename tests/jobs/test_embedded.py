"""Converting the embedded model: once, whole or not at all, whoever asks and whatever is killed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.cli import main
from studio.core.errors import StudioError
from studio.jobs.base import embedded as module
from studio.jobs.base.embedded import _as_in_transformers, ensure_embedded
from studio.probe.embedded_model import find_embedded, unpack_embedded
from studio.probe.models import find_base
from tests.fakes.model import model_folder
from tests.fakes.runs import wait_for


class _Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the slow part by writing a small whole folder; lists where it wrote."""
    written: list[Path] = []

    def convert(gguf: Path, folder: Path, context_length: Any, tell: Any) -> None:
        assert gguf.is_file()
        assert context_length == 8192
        tell("converting", 0.5)
        written.append(model_folder(folder))

    monkeypatch.setattr(module, "_convert", convert)
    return written


def test_it_is_converted_once_and_then_found(conversions: list[Path]) -> None:
    told: list[tuple[str, float]] = []
    folder = ensure_embedded(lambda stage, fraction: told.append((stage, fraction)))
    assert folder == find_embedded().folder
    assert ensure_embedded() == folder
    assert len(conversions) == 1
    assert [fraction for _, fraction in told] == [0.5, 0.95, 1.0]
    assert find_base("embedded").path == folder


def test_leftovers_of_a_killed_conversion_go_away(conversions: list[Path]) -> None:
    final = find_embedded().folder
    leftover = final.with_name(f".{final.name}.abcd.part")
    model_folder(leftover)
    ensure_embedded()
    assert not leftover.exists()
    assert sorted(path.name for path in final.parent.iterdir()) == sorted([f".{final.name}.lock", final.name])


def test_a_damaged_folder_is_made_again(conversions: list[Path]) -> None:
    folder = ensure_embedded()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3])
    assert ensure_embedded() == folder
    assert len(conversions) == 2
    assert weights.read_bytes() == whole


def test_a_failed_conversion_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path, *_: Any) -> None:
        (folder / "half").write_text("x")
        raise StudioError("no")

    monkeypatch.setattr(module, "_convert", convert)
    with pytest.raises(StudioError, match="no"):
        ensure_embedded()
    assert [p.suffix for p in find_embedded().folder.parent.iterdir()] == [".lock"]


def test_a_conversion_that_wrote_too_little_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_convert", lambda gguf, folder, *_: (model_folder(folder) / "tokenizer.json").unlink())
    with pytest.raises(StudioError, match="has no tokenizer"):
        ensure_embedded()
    assert not find_embedded().folder.exists()


def test_a_full_disk_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Disk(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(StudioError, match=r"400 MB are needed in .*, 1 MB are free"):
        ensure_embedded()
    assert conversions == []


def test_a_home_that_cannot_be_written_is_one_message(home: Path, conversions: list[Path]) -> None:
    home.write_text("a file, not a folder")
    with pytest.raises(StudioError, match="could not be written"):
        ensure_embedded()


# What several processes do at once. Each runs the real function with the conversion slowed down instead of real.
CHILD = """
import sys, time
from pathlib import Path
from studio.jobs.base import embedded
from tests.fakes.model import model_folder

def convert(gguf, folder, *rest):
    with Path(sys.argv[1]).open("a") as log:
        log.write("x")
    (folder / "half").write_text("")
    time.sleep(float(sys.argv[2]))
    (folder / "half").unlink()
    model_folder(folder)

embedded._convert = convert
print(embedded.ensure_embedded())
"""


def child(log: Path, seconds: float) -> "subprocess.Popen[str]":
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", CHILD, str(log), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_convert_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [child(log, 1.0), child(log, 1.0)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in both]
    assert outputs == [str(find_embedded().folder)] * 2
    assert log.read_text() == "x"


def test_a_killed_conversion_is_begun_again(tmp_path: Path, conversions: list[Path]) -> None:
    log = tmp_path / "log"
    process = child(log, 60.0)
    wait_for(log.exists)
    process.kill()
    process.wait(timeout=60)
    process.communicate()
    final = find_embedded().folder
    assert not final.exists()
    assert len(list(final.parent.glob("*.part")) + list(final.parent.glob(".*.part"))) >= 1, "killed in the middle"
    assert ensure_embedded() == final
    assert not list(final.parent.glob(".*.part"))


CHECKSUM = "ead091019b17d279"
"""Of the weights as transformers 5.24 reads them from the same file."""


def _checksum(folder: Path) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def test_rows_that_llama_cpp_has_turned_are_turned_back() -> None:
    heads, pairs, width = 3, 4, 5
    ours = torch.arange(heads * 2 * pairs * width).reshape(heads * 2 * pairs, width)
    theirs = ours.reshape(heads, 2, pairs, width).swapaxes(1, 2).reshape(ours.shape)  # llama.cpp's `permute`
    assert not torch.equal(theirs, ours)
    assert torch.equal(_as_in_transformers(theirs, heads), ours)


@pytest.mark.slow
def test_the_real_conversion_gives_a_model_that_knows_something() -> None:
    told: list[tuple[str, float]] = []
    folder = ensure_embedded(lambda stage, fraction: told.append((stage, fraction)))
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert max(later - before for before, later in pairwise(fractions)) < 0.35
    assert len([stage for stage, _ in told if stage.endswith(": weights")]) > 10
    assert _checksum(folder) == CHECKSUM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    assert tokenizer.model_max_length == 8192
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    with torch.no_grad():
        for prompt, expected in (("The capital of France is", " Paris"), ("1, 2, 3, 4, 5, 6,", " ")):
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            assert tokenizer.decode(logits.argmax()) == expected
    base = find_base("embedded")
    assert base.path == folder
    assert base.config is not None
    assert base.config["hidden_size"] == 576


def test_unpacking_in_a_process_of_its_own_says_what_went_wrong() -> None:
    folder = find_embedded().folder
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.write_text("a file where a folder must be")
    with pytest.raises(StudioError, match=r"could not be unpacked.*could not be written"):
        unpack_embedded()


@pytest.mark.slow
def test_data_check_counts_the_embedded_models_tokens_in_a_new_home(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_base("embedded").path is None
    assert main(["data", "check", "embedded", "--model", "embedded", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["lengths"]["tokens"]["min"] > 1
    assert "unpacked" in told.err
