"""What stories of the installed program share: its wheel, built once, and a fresh environment that has it."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from itertools import islice
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from studio.probe.embedded_model import FETCHED_VERSION, PACKAGE, find_embedded
from tests.fakes.runs import CHECKOUT

OWN_ROWS = 60
"""Rows of the visitor's own file."""


def build(source: Path, out: Path, *targets: str) -> None:
    """Build with the backend itself: what pip and build would call, without an environment that must be downloaded."""
    words = [word for target in targets for word in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *words]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)


def wheel_in(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@dataclass(frozen=True)
class Installed:
    """A fresh environment with the wheel in it."""

    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / "env" / "bin" / "lora-studio"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "LORA_STUDIO_HOME": str(self.home),
            "HF_HOME": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
        }
        return {**kept, **own, "PIP_NO_INDEX": "1", "COLUMNS": "100", "TERM": "xterm-256color"}

    def run(self, *words: str, timeout: float = 120.0, **more: str) -> "subprocess.CompletedProcess[str]":
        """Run the program; `more` are variables of its environment."""
        return subprocess.run(
            [str(self.program), *words],
            cwd=self.folder,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def declared(wheel: Path) -> set[Path]:
    """Return what the wheel's own dependencies, and theirs, have in this environment's folders of libraries."""
    (metadata,) = (text for name, text in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    wanted = message_from_bytes(metadata).get_all("Requires-Dist") or []
    seen: dict[str, importlib.metadata.Distribution] = {}
    while wanted:
        one = Requirement(wanted.pop())
        name = canonicalize_name(one.name)
        if name not in seen and (one.marker is None or one.marker.evaluate({"extra": ""})):
            seen[name] = importlib.metadata.distribution(name)
            wanted += seen[name].requires or []
    parts = ((found, file.parts[0]) for found in seen.values() for file in found.files or ())
    return {Path(str(found.locate_file(part))) for found, part in parts if part not in ("..", "__pycache__")}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build(CHECKOUT, out, "sdist", "wheel")
    return out


@pytest.fixture(scope="module")
def installed(built: Path) -> Iterator[Installed]:
    """The wheel beside those libraries of this environment that it asks for, and no others.

    Its folder has a short name: screens show paths in it.
    """
    with tempfile.TemporaryDirectory(prefix="visit-", ignore_cleanup_errors=True) as name:
        yield _install(wheel_in(built), Path(name))


def _install(wheel: Path, folder: Path) -> Installed:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    libraries = folder / "libraries"
    libraries.mkdir()
    for path in declared(wheel):
        (libraries / path.name).symlink_to(path)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel)], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return Installed(folder)


@pytest.fixture(scope="module")
def visited(installed: Installed) -> Installed:
    """The embedded model where `demo --yes` fetches it to, since tests ask no index, and an own file."""
    place = installed.home / "models" / f"{PACKAGE}-{FETCHED_VERSION}"
    place.mkdir(parents=True)
    with (CHECKOUT / "recipes" / "data" / "stdlib_qa.jsonl").open(encoding="utf-8") as source:
        (installed.folder / "mine.jsonl").write_text("".join(islice(source, OWN_ROWS)))
    (place / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(find_embedded().gguf)
    return installed


@pytest.fixture(scope="module")
def recommended(visited: Installed) -> Path:
    """The recipe that the set-up recommends for the own file, by its verb."""
    file = visited.folder / "mine.toml"
    asked = ("--model", "embedded", "--data", "mine.jsonl", "--goal", "task")
    done = visited.run("setup", *asked, "--out", str(file))
    assert done.returncode == 0, done.stderr
    return file
