"""From a job that was asked for to a worker that holds its run, and what is left where that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput, StudioError
from studio.core.events import Started
from studio.core.gpu_catalogue import GIB
from studio.core.recipe import Recipe
from studio.launch.start import prepare, resume, start
from studio.probe.device import Place
from studio.probe.models import find_base
from studio.probe.plan import plan_for
from studio.runs.control import requested
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from tests.fakes.runs import MODULE, fake_environment, write_log


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = ({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (os.fsdecode(b"na\xefve"), "not UTF-8"),
        ("/".join(["d" * 200] * 19), "too long"),
        ("d" * 300 + "/" + "d" * 300, "(?i)too long"),  # the system refuses the name itself, where the folder is made
        ("file/runs", "no folder"),
    ],
)
def test_a_place_where_the_last_save_would_fail_is_refused_before_the_start(
    data: Path, tmp_path: Path, place: str, said: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=said):
        start(Recipe().with_("data.path", str(data)), tmp_path / place, module=MODULE)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("file", data.name)] == []


def test_starting_leaves_a_live_run_and_a_failure_to_start_leaves_nothing(data: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="mine").with_("data.path", str(data))
    root = tmp_path / "runs"

    def popen(*_: Any, **__: Any) -> Any:
        raise OSError("no processes left")

    with pytest.raises(StudioError, match="no processes left"):
        start(recipe, root, module=MODULE, popen=popen)
    assert list(root.iterdir()) == []
    seen = []
    paths = start(recipe, root, module=MODULE, environment=fake_environment(steps=1), on_checked=seen.append)
    assert paths.name.startswith("mine-")
    assert len(seen) == 1


def test_a_run_keeps_how_many_layers_are_computed_again(data: Path, tmp_path: Path) -> None:
    recipe = Recipe().with_("data.path", str(data)).with_("device.device", "cpu")
    base, place = find_base("embedded"), Place()
    every, none = (plan_for(recipe.with_("train.recompute", word), base, place=place) for word in ("all", "none"))
    between = (every["high_bytes"] + none["high_bytes"]) / 2 / GIB
    recipe = recipe.with_("train.recompute", "auto").with_("device.budget_gib", between)
    environment = fake_environment(steps=1)
    paths = start(recipe, tmp_path / "runs", module=MODULE, environment=environment)
    kept = read_job(paths, Recipe).train.recompute
    assert isinstance(kept, int)
    plan = json.loads(paths.plan.read_text())
    assert (plan["setup"]["recompute"], plan["fits"]) == (kept, True)


def test_a_run_keeps_how_many_layers_are_streamed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe().with_("data.path", str(data)).with_("model.stream", "auto").with_("device.device", "cpu")
    plan: dict[str, Any] = {"setup": {"stream": 7, "recompute": "all"}, "card": {"name": "X"}}
    plan["host_parts"] = {"weights": 10**15, "checkpoints": 0}
    monkeypatch.setattr("studio.launch.kinds.plan_for", lambda *given, **named: plan)
    with pytest.raises(BadInput, match="wait in main memory and need about 1000000"):
        start(recipe, tmp_path / "runs", module=MODULE)
    plan["host_parts"]["weights"] = 10**6
    paths = start(recipe, tmp_path / "runs", module=MODULE, environment=fake_environment(steps=1))
    assert read_job(paths, Recipe).model.stream == 7


def test_who_interrupts_the_start_wants_no_run(data: Path, tmp_path: Path) -> None:
    def popen(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(Recipe().with_("data.path", str(data)), tmp_path / "runs", module=MODULE, popen=popen)
    (paths,) = (RunPaths(folder) for folder in (tmp_path / "runs").iterdir())
    assert requested(paths, "stop")


def test_who_interrupts_the_making_of_a_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("studio.launch.start.write_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(Recipe(), tmp_path / "runs", 1e9)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_path_that_is_no_utf8_is_refused_and_leaves_no_folder(tmp_path: Path) -> None:
    job = MergeRequest(adapter="/models/caf\udce9\x1b[31m/adapter", base="embedded", out="/o")
    with pytest.raises(BadInput, match=r"this path is not: .*; rename") as caught:
        prepare(job, tmp_path / "runs", 1e9)
    assert "/models/caf\\udce9" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_estimate_at_launch_is_kept(tmp_path: Path) -> None:
    paths = prepare(Recipe(), tmp_path / "runs", 1e9, {"peak_bytes": 7})
    assert json.loads(paths.plan.read_text()) == {"peak_bytes": 7}


def test_resume_knows_the_module_of_each_kind_of_job(tmp_path: Path) -> None:
    paths = prepare(MergeRequest("/a", "embedded", "/o"), tmp_path, 1e9)
    write_log(paths, Started(at=1.0, job="merge"))
    seen: list[list[str]] = []

    def popen(command: list[str], **_: Any) -> "subprocess.Popen[bytes]":
        seen.append(command)
        return subprocess.Popen([sys.executable, "-c", ""])

    resume(paths, popen=popen)
    assert seen[0][2] == "studio.jobs.merge"


def test_a_kind_of_job_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for text in ("job = 'dance'", "job = 7"):
        paths.recipe.write_text(text)
        with pytest.raises(BadInput, match="does not know: update lora-studio"):
            resume(paths)
