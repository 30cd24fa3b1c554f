"""A tiny model, tiny data and a way to run the real training job in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.core.recipe import Recipe
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.requests import MergeRequest
from studio.runs.worker import Worker
from tests.fakes.tiny_model import make_tiny_model

Train = Callable[..., RunPaths]
Merge = Callable[..., RunPaths]

QUESTIONS = [("one", "uno"), ("two", "dos"), ("three", "tres"), ("four", "cuatro"), ("five", "cinco"), ("six", "seis")]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished runs are remembered here and not in the home of whoever runs the tests."""
    monkeypatch.setattr("studio.runs.kept_list.studio_home", lambda: tmp_path / "home")
    return tmp_path / "home" / "calibration.json"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in a folder."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six short chats."""
    path = tmp_path / "data.jsonl"
    turns = [[("user", question), ("assistant", reply)] for question, reply in QUESTIONS]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def recipe(tiny: Path, data: Path) -> Recipe:
    """Five fp32 LoRA steps on the tiny model, nothing held out."""
    settings: dict[str, object] = {
        "name": "tiny",
        "method": "lora",
        "model.base": str(tiny),
        "model.dtype": "fp32",
        "adapter.rank": 4,
        "adapter.alpha": 8.0,
        "data.path": str(data),
        "train.micro_batch": 2,
        "train.accumulation": 1,
        "train.seq_len": 64,
        "train.steps": 5,
        "train.learning_rate": 5e-3,
        "train.schedule": "constant",
        "train.warmup_fraction": 0.0,
        "train.checkpoint_every": 0,
        "train.recompute": "none",
        "train.packing": "off",
        "train.group_by_length": False,
        "eval.rows": 0,
        "eval.samples": 0,
        "eval.every": 0,
        "device.device": "cpu",
    }
    made = Recipe()
    for path, value in settings.items():
        made = made.with_(path, value)
    assert made.problems() == ()
    return made


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run a recipe's job, or a body in its place, in a new run folder or again in an old one; returns its paths."""
    from studio.jobs.train.__main__ import _body, _explain

    def run(recipe: Recipe, again: RunPaths | None = None, body: Callable[[Worker], None] = _body) -> RunPaths:
        paths = again or RunPaths(tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}")
        if again is None:
            paths.root.mkdir()
            write_job(paths, recipe)
        run_job(paths.root, body, explain=_explain)
        return paths

    return run


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """Run the merge job in this process, in a new run folder; returns its paths."""
    from studio.jobs.merge.__main__ import _body

    def run(adapter: Path, base: Path | str, out: Path, **more: Any) -> RunPaths:
        paths = RunPaths(tmp_path / f"merge-{len(list(tmp_path.glob('merge-*')))}")
        paths.root.mkdir()
        write_job(paths, MergeRequest(str(adapter), str(base), str(out), **more))
        run_job(paths.root, _body)
        return paths

    return run


def history_of(paths: RunPaths) -> History:
    """Everything that a run told."""
    history = History()
    history.fold(read_events(paths.events))
    return history
