"""A training whose disk fills, on a real small one: it waits, says so and goes on, and no loss differs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from studio.core.events import Failed, Finished, Paused, RunEvent, Saved, StepDone, Unknown, Warned
from studio.core.recipe import Recipe
from studio.runs.control import request
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.requests import AuditRequest
from studio.runs.status import Status, run_status
from studio.runs.worker import Worker
from tests.fakes.small_disk import Filler, small_disk
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.adapter_cases import write_chats
from tests.jobs.audit_cases import audit
from tests.jobs.conftest import Train, history_of

_PAGE = 4096


@pytest.fixture
def wanted(recipe: Recipe) -> Recipe:
    """Checkpoints on the way, held-out rows and an answer: every kind of event."""
    settings = {"train.checkpoint_every": 2, "eval.rows": 2, "eval.every": 2, "eval.samples": 1, "train.steps": 5}
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    return recipe.with_("eval.sample_tokens", 2)


@pytest.fixture
def with_room(train: Train, wanted: Recipe) -> list[RunEvent]:
    """What the same run tells where there is room."""
    return read_events(train(wanted).events)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "3m") as place:
        yield place


def _run_on(disk: Path, train: Train, wanted: Recipe) -> RunPaths:
    paths = RunPaths(disk / "run")
    paths.root.mkdir()
    write_job(paths, wanted)
    return train(wanted, again=paths)


def _losses(events: list[RunEvent]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepDone)]


def _told(events: list[RunEvent]) -> list[tuple[str, int | None]]:
    """Kinds and steps, without the waiting and without what the clock decides."""
    left_out = ("Paused", "Warned", "Phase")
    return [(event.kind, getattr(event, "step", None)) for event in events if event.kind not in left_out]


def _fill(worker: Worker, filler: Filler) -> None:
    """Leave no byte on the disk, nor in the log's last page; an empty line is no event."""
    rest = -(worker.paths.events.stat().st_size + 1) % _PAGE
    with worker.paths.events.open("ab") as log:
        log.write(b" " * rest + b"\n")
    worker._log._size += rest + 1
    filler.fill()


def _fill_at(
    monkeypatch: pytest.MonkeyPatch, disk: Path, here: Callable[[type[RunEvent], dict[str, Any]], bool], naps: list[Any]
) -> None:
    """Fill the disk when such an event is told; room comes while the run waits."""
    emit, filler = Worker.emit, Filler(disk)

    def nap(worker: Worker) -> None:
        naps.append(run_status(worker.paths))
        if filler.full and len(naps) % 15 == 0:
            filler.free()

    def full(self: Worker, kind: type[RunEvent], **fields: Any) -> None:
        self.sleep = lambda seconds: nap(self)
        if kind is not Paused and not filler.full and here(kind, fields):
            _fill(self, filler)
        emit(self, kind, **fields)

    monkeypatch.setattr(Worker, "emit", full)


def test_every_event_finds_a_full_disk_and_none_is_lost(
    train: Train, wanted: Recipe, with_room: list[RunEvent], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[Status] = []
    _fill_at(monkeypatch, disk, lambda kind, fields: True, naps)
    paths = _run_on(disk, train, wanted)
    events = read_events(paths.events)
    assert _told(events) == _told(with_room)
    assert _losses(events) == _losses(with_room), "the waiting changed what was learnt"
    assert not any(isinstance(event, Unknown) for event in events), "a line was torn"
    waits = [event for event in events if isinstance(event, Paused)]
    assert len(waits) >= 2 * len(with_room) - 4
    assert [event.paused for event in waits] == [True, False] * (len(waits) // 2)
    assert "full" in waits[0].reason
    assert set(naps) == {Status.paused, Status.starting} or set(naps) == {Status.paused}
    assert run_status(paths) is Status.finished
    assert not (paths.root / ".reserve").exists()
    assert isinstance(events[-1], Finished)


def test_statistics_without_room_cost_themselves(
    train: Train, wanted: Recipe, with_room: list[RunEvent], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is written after the adapter is saved, before the end is told."""
    emit, filler = Worker.emit, Filler(disk)

    def full(self: Worker, kind: type[RunEvent], **fields: Any) -> None:
        emit(self, kind, **fields)
        self.sleep = lambda seconds: filler.free()
        if fields.get("what") == "adapter":
            filler.fill()

    monkeypatch.setattr(Worker, "emit", full)
    paths = _run_on(disk, train, wanted)
    events = read_events(paths.events)
    warnings = [event.message for event in events if isinstance(event, Warned) and event.topic == "calibration"]
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert isinstance(events[-1], Finished)
    assert _losses(events) == _losses(with_room)


@pytest.mark.slow
def test_an_audit_on_a_full_disk_says_so_and_is_taken_up_again(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = make_tiny_model(tmp_path / "model", num_hidden_layers=3), write_chats(tmp_path / "rows.jsonl")
    wanted = AuditRequest("base", model=str(model), data=str(data), rows=8, forms=("nf4",), kept=(1,))
    _, with_room = audit(tmp_path / "room", wanted)
    emit, filler = Worker.emit, Filler(disk)

    def full(self: Worker, kind: type[RunEvent], **fields: Any) -> None:
        emit(self, kind, **fields)
        if fields.get("name") == "auditing" and (fields.get("fraction") or 0) > 0.3:
            _fill(self, filler)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "emit", full)
        patch.setattr("studio.jobs.audit.kept._EVERY_SECONDS", 0.0)
        paths, report = audit(disk / "run", wanted)
    failed = read_events(paths.events)[-1]
    assert isinstance(failed, Failed)
    assert failed.failure == "disk_full"
    assert not report
    assert not list(paths.root.rglob("*.part"))
    filler.free()
    _, report = audit(paths.root, wanted)
    assert report["variants"] == with_room["variants"]


def test_a_stop_while_it_waits_is_heeded_and_the_run_goes_on_later(
    train: Train, wanted: Recipe, with_room: list[RunEvent], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, emit, paths = Filler(disk), Worker.emit, RunPaths(disk / "run")

    def full(self: Worker, kind: type[RunEvent], **fields: Any) -> None:
        self.sleep = lambda seconds: request(self.paths, "stop")
        if kind is StepDone and fields["step"] == 4 and not filler.full:
            _fill(self, filler)
        emit(self, kind, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "emit", full)
        _run_on(disk, train, wanted)
    failed = read_events(paths.events)[-1]
    assert isinstance(failed, Failed)
    assert failed.failure == "disk_full"
    assert "runs resume RUN" in failed.advice
    filler.free()
    (paths.control / "stop").unlink()
    train(wanted, again=paths)
    history = history_of(paths)
    assert history.finished is not None
    assert list(history.train.losses) == _losses(with_room)
    assert [saved.what for saved in history.saved if isinstance(saved, Saved)][-1] == "adapter"
