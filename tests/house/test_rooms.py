"""Each room is imported whole in a fresh interpreter, and `sys.modules` is read: what is there was really imported."""

import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import studio
import widgets

ROOT = Path(__file__).resolve().parents[2]
JOB_LIBRARIES = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"}
SCREEN_LIBRARIES = {"textual", "widgets"}
# What a package cannot help bringing along: parts of the interpreter, editable-install hooks and coverage.
_INTERPRETER = {
    "__main__",
    "__mp_main__",
    "_virtualenv",
    "_distutils_hack",
    "sitecustomize",
    "usercustomize",
    "coverage",
}

_IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""

_CALL = """
import json, sys
from tests.fakes.cli import FAKES
from studio.cli import main
code = main(sys.argv[1:], modules=FAKES)
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def _modules_of(package: object, prefix: str) -> list[str]:
    paths = package.__path__  # type: ignore[attr-defined]
    return [module.name for module in pkgutil.walk_packages(paths, prefix) if not module.name.endswith("__main__")]


def _room(name: str) -> list[str]:
    known = [*_modules_of(studio, "studio."), "widgets", *_modules_of(widgets, "widgets.")]
    found = [module for module in known if module == name or module.startswith(f"{name}.")]
    assert found, f"the room {name} has no modules"
    return found


def _loaded_by(names: list[str]) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *names], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def _tops(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def _rooms(modules: set[str]) -> set[str]:
    return {".".join(module.split(".")[:2]) for module in modules if module.startswith("studio.")}


def test_core_loads_the_standard_library_and_itself_only() -> None:
    loaded = _loaded_by(_room("studio.core"))
    bare = _tops(_loaded_by([]))
    foreign = _tops(loaded) - set(sys.stdlib_module_names) - bare - _INTERPRETER - {"studio"}
    assert foreign == set()
    assert _rooms(loaded) == {"studio.core"}


@pytest.mark.parametrize(
    ("room", "rooms_below"),
    [
        ("studio.runs", {"studio.core"}),
        ("studio.probe", {"studio.core", "studio.runs"}),
        ("studio.launch", {"studio.core", "studio.runs", "studio.probe"}),
    ],
)
def test_lower_rooms_know_neither_screens_nor_jobs(room: str, rooms_below: set[str]) -> None:
    loaded = _loaded_by(_room(room))
    assert _tops(loaded) & (JOB_LIBRARIES | SCREEN_LIBRARIES) == set()
    assert _rooms(loaded) <= {room, *rooms_below}


@pytest.mark.parametrize("room", ["studio.tui", "studio.commands", "studio.cli"])
def test_the_terminal_process_never_loads_the_jobs_libraries(room: str) -> None:
    loaded = _loaded_by(_room(room))
    assert _tops(loaded) & JOB_LIBRARIES == set()
    assert "studio.jobs" not in _rooms(loaded)


def test_the_memory_of_our_own_loop_knows_nothing_of_other_peoples() -> None:
    loaded = _loaded_by([name for name in _room("studio.core") if not name.startswith("studio.core.stock")])
    assert not [name for name in loaded if name.startswith("studio.core.stock")]


@pytest.mark.parametrize("room", ["studio.probe", "studio.launch", "studio.tui"])
def test_only_verbs_compare_with_other_peoples_loops(room: str) -> None:
    assert not [name for name in _loaded_by(_room(room)) if name.startswith("studio.core.stock")]


def test_widgets_can_be_lifted_out() -> None:
    loaded = _loaded_by(_room("widgets"))
    assert "studio" not in loaded
    assert _tops(loaded) & JOB_LIBRARIES == set()


def test_jobs_never_load_the_screens() -> None:
    loaded = _loaded_by([*_room("studio.jobs"), "studio.jobs.train.__main__"])
    assert "torch" in loaded
    assert _tops(loaded) & SCREEN_LIBRARIES == set()
    assert _rooms(loaded) & {"studio.launch", "studio.tui", "studio.cli", "studio.commands"} == set()


@pytest.mark.parametrize("job", ["studio.jobs.train", "studio.jobs.merge", "studio.jobs.export", "studio.jobs.measure"])
def test_a_job_holds_its_run_before_it_loads_torch(job: str) -> None:
    loaded = _loaded_by([f"{job}.__main__"])
    assert _tops(loaded) & JOB_LIBRARIES == set()
    assert "studio.runs.worker" in loaded


_LIGHT = {
    "textual",
    "rich",
    "plotext",
    "filelock",
    "psutil",
    "pynvml",
    "huggingface_hub",
    "pyarrow",
    "numpy",
    "tokenizers",
}


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--version"], _LIGHT | {"tomlkit", "platformdirs"}),
        (["--help"], _LIGHT | {"tomlkit", "platformdirs"}),
        (["runs", "list"], _LIGHT | {"hashlib"}),
        (["runs", "list", "--json"], _LIGHT),
        (["recipes"], _LIGHT),
        (["plan", "demo", "--json"], _LIGHT - {"pynvml"} | {"hashlib", "platform"}),
        (["gpus"], _LIGHT - {"pynvml"}),
        (["data", "check", "embedded"], _LIGHT),
        (["train", "demo", "--json"], _LIGHT - {"plotext", "pynvml"}),  # the plan at launch asks which card there is
        (["demo", "--no-tui"], _LIGHT - {"plotext", "pynvml"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_verb_loads_only_what_it_needs(tmp_path: Path, words: list[str], absent: set[str]) -> None:
    environment = {**os.environ, "LORA_STUDIO_HOME": str(tmp_path), "FAKE_STEPS": "3", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _CALL, *words], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    code, loaded = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    assert _tops(set(loaded)) & (JOB_LIBRARIES | absent) == set()


def _contracts() -> list[dict[str, object]]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found: list[dict[str, object]] = table["tool"]["importlinter"]["contracts"]
    return found


def test_the_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(_contracts())} kept, 0 broken" in done.stdout


def test_every_room_is_under_a_contract() -> None:
    named = json.dumps(_contracts())
    rooms = [module.name for module in pkgutil.iter_modules(studio.__path__, "studio.")]
    for room in rooms:
        assert room == "studio.__main__" or f'{room}"' in named or f"{room} " in named, f"no contract names {room}"


LONGER = {
    "studio/core/recipe.py": 900,  # declares some eighty fields, about eight lines each: a table, read by its rows
}


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("studio/**/*.py"), *ROOT.glob("widgets/**/*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_grows_past_reading(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LONGER.get(str(path.relative_to(ROOT)), 400), (
        f"{path.relative_to(ROOT)} has {lines} lines: give a part of it a file of its own"
    )
