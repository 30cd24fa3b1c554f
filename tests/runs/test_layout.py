import ast
import stat
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import studio
from studio.core.errors import BadInput
from studio.runs import checkpoints, layout
from studio.runs.checkpoints import ADAPTER_TENSORS, INITIAL_TENSORS, MARKER
from studio.runs.home import cache_root, runs_root, studio_home
from studio.runs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RunPaths, new_run, slug

NOW = 1_764_000_000.0
_ALLOWED = set(string.ascii_lowercase + string.digits + "._-")


@given(st.text())
def test_any_name_becomes_a_harmless_folder_name(name: str) -> None:
    made = slug(name)
    assert made
    assert set(made) <= _ALLOWED
    assert len(made) <= 48
    assert ".." not in made
    assert made[0] not in "-._"
    assert made[-1] not in "-._"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Llama-3.1 8B, QLoRA", "llama-3.1-8b-qlora"),
        ("../../etc/passwd", "etc-passwd"),
        ("/", "run"),
        ("", "run"),
        ("\x1b[31mred\x1b[0m", "31mred-0m"),
        ("naïve café", "naive-cafe"),
        ("日本語", "run"),
        ("a" * 5000, "a" * 48),
        (".hidden", "hidden"),
        ("con\0nul", "con-nul"),
    ],
)
def test_known_hostile_names(name: str, wanted: str) -> None:
    assert slug(name) == wanted


def test_a_run_lies_in_the_root_whatever_its_name(tmp_path: Path) -> None:
    paths = new_run(tmp_path / "runs", "../../../escape", NOW)
    assert paths.root.parent == tmp_path / "runs"
    assert paths.control.is_dir()
    assert stat.S_IMODE(paths.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "runs").stat().st_mode) == 0o700


def test_two_runs_of_one_second_get_different_folders(tmp_path: Path) -> None:
    names = [new_run(tmp_path, "same", NOW).name for _ in range(3)]
    assert len(set(names)) == 3
    assert names[1] == f"{names[0]}-2"
    assert names[2] == f"{names[0]}-3"


def test_where_no_folder_can_be_made_the_message_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file.*--runs-dir"):
        new_run(tmp_path / "file", "x", NOW)


def test_a_folder_is_a_run_when_it_holds_a_recipe_or_events(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert not paths.exists
    paths.events.write_text("")
    assert paths.exists


def test_home_follows_the_environment_and_asking_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    assert studio_home() == tmp_path / "home"
    assert runs_root() == tmp_path / "home" / "runs"
    assert cache_root() == tmp_path / "home" / "cache"
    monkeypatch.setenv("LORA_STUDIO_HOME", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert studio_home().name == "lora-studio"
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_holds_is_named_in_one_place() -> None:
    """No other module spells the name of a file of a run: where it is renamed, all follow."""
    paths = RunPaths(Path("run"))
    files = {value.name for name in dir(RunPaths) if isinstance(value := getattr(paths, name, None), Path)}
    names = {name for name in files if "." in name} | {
        MARKER,
        ADAPTER_TENSORS,
        INITIAL_TENSORS,
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
    }
    assert len(names) > 15
    homes = {Path(layout.__file__), Path(checkpoints.__file__)}
    for module in sorted(Path(studio.__file__).parent.rglob("*.py")):
        if module not in homes:
            constants = (node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Constant))
            spelled = {node.value for node in constants if isinstance(node.value, str)}
            assert not spelled & names, f"{module} spells {spelled & names}: take it from {layout.__name__}"
