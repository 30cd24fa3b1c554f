"""The whole list, rehearsed on this CPU: every check runs, none is lost, and each leaves all as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio.runs.home import studio_home
from tests.gpu.__main__ import ROOT
from tests.gpu.catalogue import CHECKS, IDENTITY, PARTS, PREPARE
from tests.gpu.runner import OK, Surroundings


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    watched = (ROOT, studio_home())
    before = Surroundings.look(watched)
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "cpu", "--out", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert before.changes_to(Surroundings.look(watched)) == []
    told = done.stdout[-5000:] + done.stderr[-2000:]
    assert done.returncode == 0, told
    table = json.loads((tmp_path / "results-cpu.json").read_text("utf-8"))
    assert table["missing"] == [], told
    outcomes = {one["name"]: one["outcome"] for one in table["checks"]}
    assert list(outcomes) == [check.name for check in (IDENTITY, PREPARE, *CHECKS)]
    assert set(outcomes.values()) == {OK}, {name: word for name, word in outcomes.items() if word != OK}
    assert all(one["changed"] == [] for one in table["checks"])
    section = (tmp_path / "results-cpu.md").read_text("utf-8")
    assert section.startswith(f"## {table['date']}, Rehearsal on a CPU")
    assert all(f"| {check.name} | ok |" in section for check in CHECKS)
    assert "nothing here says anything about a card" in done.stdout


def test_the_list_is_sound() -> None:
    """Names are unique, every function is there, and any two limits fit a call of ten minutes."""
    names = [check.name for check in (IDENTITY, PREPARE, *CHECKS)]
    assert len(set(names)) == len(names)
    assert max(check.limit_seconds for check in CHECKS) + IDENTITY.limit_seconds < 600
    assert PARTS[0] == "identity" and PARTS[-1] == "speed"


@pytest.mark.slow
def test_the_checks_need_no_pytest() -> None:
    """They run on a Python that has the program's dependencies and nothing else."""
    modules = sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("test_", "__"))
    )
    names = ", ".join(f"tests.gpu.{name}" for name in modules)
    code = f"import sys; sys.modules['pytest'] = None; import {names}, tests.bench.engines, tests.bench.bench_train"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def listed(*words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", *words, "--list"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return done.stdout.splitlines()


def test_a_part_or_words_choose(tmp_path: Path) -> None:
    assert len(listed()) == len(CHECKS)
    assert all(line.startswith("numbers") for line in listed("cpu", "--part", "numbers"))
    chosen = listed("resumed", "generation")
    assert len(chosen) == 5 and all("resumed" in line or "generation" in line for line in chosen)
    done = subprocess.run([sys.executable, "-m", "tests.gpu", "cpu", "nonsense"], check=False, cwd=ROOT)
    assert done.returncode == 2


def made_by(*arguments: str, **variables: str) -> str:
    """The interpreter that `make gpu-check` takes."""
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "-n", "-f", str(ROOT / "Makefile"), *arguments, "gpu-check"],
        check=True,
        capture_output=True,
        text=True,
        env={**plain, **variables},
    )
    return done.stdout.split()[0]


def test_make_takes_the_environments_interpreter_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert made_by() == "python3"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert made_by() == ".venv/bin/python"
    assert made_by("PYTHON=/opt/python") == "/opt/python"
    assert made_by(PYTHON="python3.12") == "python3.12"
