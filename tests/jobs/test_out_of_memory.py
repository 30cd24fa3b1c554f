"""Real jobs whose memory is really refused: torch's allocator is asked for more than any computer has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.core.events import Failed, Phase, RunEvent
from studio.core.recipe import Recipe
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.requests import AuditRequest, ExportRequest
from studio.runs.worker import Worker
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.adapter_cases import write_chats
from tests.jobs.audit_cases import audit
from tests.jobs.conftest import Merge, Train
from tests.jobs.merge_cases import make_adapter, make_base


@pytest.fixture
def refuse_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the job ask for too much where it tells that it is at this phase."""

    def set_up(phase: str) -> None:
        emit = Worker.emit

        def asking(self: Worker, kind: type[RunEvent], **fields: Any) -> None:
            emit(self, kind, **fields)
            if kind is Phase and fields["name"] == phase:
                torch.empty(10**14)

        monkeypatch.setattr(Worker, "emit", asking)

    return set_up


def _failed(paths: RunPaths) -> Failed:
    end = read_events(paths.events)[-1]
    assert isinstance(end, Failed)
    assert end.failure == "out_of_memory", end
    assert "the computer's memory is full" in end.message
    assert "DefaultCPUAllocator" in end.message
    return end


@pytest.mark.parametrize(
    ("phase", "during", "advised", "never"),
    [
        ("loading the base model", "while loading", "method qlora", "micro_batch"),
        ("training", "is full:", "train.micro_batch", "smaller base model"),
        ("evaluating", "while evaluating", "train.micro_batch", "smaller base model"),
        ("answering", "while evaluating", "eval.sample_tokens", "smaller base model"),
        ("saving a checkpoint", "while saving", "runs resume RUN", "micro_batch"),
        ("saving the adapter", "while saving", "runs resume RUN", "micro_batch"),
    ],
)
def test_a_trainings_advice_is_for_what_it_was_at(
    train: Train,
    recipe: Recipe,
    refuse_at: Callable[[str], None],
    phase: str,
    during: str,
    advised: str,
    never: str,
) -> None:
    refuse_at(phase)
    for path, value in {"eval.rows": 2, "eval.samples": 1, "train.checkpoint_every": 2, "train.steps": 3}.items():
        recipe = recipe.with_(path, value)
    failed = _failed(train(recipe))
    assert during in failed.message
    assert advised in failed.advice
    assert never not in failed.advice


def test_the_optimizers_own_memory_is_told_from_the_steps(train: Train, recipe: Recipe) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    hook = register_optimizer_step_pre_hook(lambda *called: torch.empty(10**14))
    try:
        failed = _failed(train(recipe.with_("train.optimizer", "adamw_torch")))
    finally:
        hook.remove()
    assert "in the optimizer's step" in failed.message
    assert "8-bit or paged" in failed.advice


def test_an_audit(tmp_path: Path, refuse_at: Callable[[str], None]) -> None:
    model, data = make_tiny_model(tmp_path / "model"), write_chats(tmp_path / "rows.jsonl")
    refuse_at("auditing")
    paths, _ = audit(tmp_path / "run", AuditRequest("base", model=str(model), data=str(data), rows=8, forms=("nf4",)))
    assert "--rows" in _failed(paths).advice


def test_a_merge_and_an_export(tmp_path: Path, merge: Merge, refuse_at: Callable[[str], None]) -> None:
    from studio.jobs.export.__main__ import _body

    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    refuse_at("merging")
    assert "--dtype bf16" in _failed(merge(adapter, base, tmp_path / "out")).advice
    assert not list(tmp_path.glob("*out*"))
    refuse_at("quantising")
    paths = RunPaths(tmp_path / "export")
    paths.root.mkdir()
    write_job(paths, ExportRequest(str(base), str(tmp_path / "out"), "nf4"))
    run_job(paths.root, _body)
    assert "export on a computer with more memory" in _failed(paths).advice
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("fatal", "advised"), [(True, "--device cpu"), (False, "new conversation")])
def test_a_chat(fatal: bool, advised: str) -> None:
    from studio.jobs.chat.__main__ import _failure

    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    told = _failure(caught.value, fatal=fatal)
    assert "memory is full" in told.message
    assert advised in told.advice
    assert told.fatal is fatal
