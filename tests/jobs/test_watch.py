"""What is watched over a training: each finding is said once, with what to do; the checkpoint from before is kept."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from studio.core.errors import JobFailed
from studio.core.events import Finished, Planned, Saved, Started, StepDone, Warned
from studio.core.gpu_catalogue import GIB
from studio.jobs.train.watch import Clocks, TrainingWatch, way_back
from studio.probe.cards import card_state
from studio.runs.checkpoints import outdated, step_of
from studio.runs.last_words import crash_of
from studio.runs.log import read_events
from studio.runs.memory_kills import ALMOST_FULL
from studio.runs.watch import read_history
from tests.fakes.nvml_library import LOST, Library, LibraryCard
from tests.fakes.runs import LiveWorker, make_run
from tests.runs.test_checkpoints import checkpoint


class Watched:
    """A training whose steps, clocks, disk and card are what a test says."""

    def __init__(self, worker: LiveWorker) -> None:
        self.worker = worker
        self.wall = self.steady = self.boot = 1000.0
        self.free = 500 * GIB
        self.spills = False
        self.available = 8 * GIB
        self.watch = TrainingWatch(
            worker,
            clocks=lambda: Clocks(self.wall, self.steady, self.boot),
            free_bytes=lambda folder: self.free,
            card=card_state,
            memory=lambda: SimpleNamespace(total=16 * GIB, free=self.available),
            spills=lambda: self.spills,
        )
        self.step = 0
        worker.emit(Started, job="train")

    def steps(self, count: int, loss: float = 2.0, seconds: float = 1.0) -> None:
        for _ in range(count):
            self.step += 1
            fields: dict[str, Any] = {"learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 100}
            self.worker.emit(StepDone, step=self.step, loss=loss + self.step % 3 / 10, seconds=seconds, **fields)

    def after(self, seconds: float, *, wall: float = 0.0, asleep: float = 0.0) -> None:
        self.steady += seconds
        self.boot += seconds + asleep
        self.wall += seconds + asleep + wall
        self.watch.look()

    def planned_on(self, uuid: str, weights: int = 1) -> None:
        known: dict[str, Any] = {"trainable_parameters": weights, "rows": 1, "held_out_rows": 0, "loss_path": "chunked"}
        self.worker.emit(Planned, total_steps=9, device="a", dtype="bf16", card={"uuid": uuid}, **known)

    def told(self, topic: str) -> list[str]:
        events = read_events(self.worker.paths.events)
        return [event.message for event in events if isinstance(event, Warned) and event.topic == topic]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with LiveWorker(make_run(tmp_path)) as worker:
        yield Watched(worker)
        worker.emit(Finished, outcome="done")


def test_a_spike_names_the_checkpoint_from_before_and_keeps_it(watched: Watched) -> None:
    paths = watched.worker.paths
    made = [checkpoint(paths, step) for step in (40, 60, 79, 80)]
    watched.steps(80)
    watched.steps(30, loss=9.0)
    (told,) = watched.told("spike")
    assert "from about 2.1 to 9.1 since step 81" in told
    # The weights of step 80 gave the first high loss, so that its checkpoint is not trusted.
    assert f"of step 79; to go back to it: lora-studio runs resume {paths.name} --checkpoint 79; it is kept" in told
    checkpoint(paths, 100)
    checkpoint(paths, 110)
    assert [step_of(folder) for folder in outdated(paths.checkpoints, 2)] == [40, 60, 80]
    assert made[2] not in outdated(paths.checkpoints, 1)


def test_a_spike_before_any_checkpoint_names_none(watched: Watched) -> None:
    watched.steps(40)
    watched.steps(5, loss=9.0)
    (told,) = watched.told("spike")
    assert "checkpoint" not in told


@pytest.mark.parametrize(("kind", "named"), [("nonfinite_loss", True), ("nonfinite_gradient", True), ("other", False)])
def test_a_failure_of_the_numbers_names_the_checkpoint_from_before(watched: Watched, kind: str, named: bool) -> None:
    for step in (10, 20, 30):
        checkpoint(watched.worker.paths, step)
    watched.steps(30)
    failure = way_back(JobFailed(kind, "the loss is nan at step 31", "lower the learning rate"), watched.worker)
    assert (failure.kind, str(failure)) == (kind, "the loss is nan at step 31")
    assert failure.advice.startswith("lower the learning rate")
    assert failure.advice.endswith(f"lora-studio runs resume {watched.worker.paths.name} --checkpoint 20") == named


def test_slow_steps_are_told_with_what_the_card_says(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    card = LibraryCard("GPU-a", reasons=0x04)
    Library([card]).installed(monkeypatch)
    watched.planned_on("GPU-a")
    watched.steps(40)
    watched.after(5)
    card.reasons, card.celsius = 0x04 | 0x40, 97
    watched.steps(20, seconds=4.0)
    (told,) = watched.told("slow")
    assert "4.0 times as long as before" in told
    assert "too hot: the hardware slows it down; the card is at 97 degrees" in told
    assert "power" not in told  # it was at its limit before, too
    watched.steps(20)
    assert "as fast as before again" in watched.told("slow")[1]


def test_slow_steps_of_a_full_card_are_told_where_the_driver_spills(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    Library([LibraryCard("GPU-a", free_gib=0.1)]).installed(monkeypatch)
    watched.planned_on("GPU-a")
    watched.spills = True
    watched.steps(40)
    watched.steps(20, seconds=4.0)
    assert "moves what does not fit into main memory" in watched.told("slow")[0]


def test_slow_steps_without_a_reason_say_so(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    Library([LibraryCard("GPU-a")]).installed(monkeypatch)
    watched.planned_on("GPU-a")
    watched.steps(40)
    watched.steps(20, seconds=4.0)
    assert "nothing that can be seen from here is the reason" in watched.told("slow")[0]


def test_a_card_that_vanishes_is_told_once_and_one_that_was_never_seen_is_not(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = LibraryCard("GPU-a")
    library = Library([card]).installed(monkeypatch)
    watched.planned_on("GPU-other")
    watched.after(5)
    assert watched.told("card") == []
    watched.planned_on("GPU-a")
    watched.after(5)
    card.answers["every"] = LOST
    watched.after(5)
    watched.after(5)
    (told,) = watched.told("card")
    assert "fallen off the bus" in told
    assert library.cards == [card]


def test_a_clock_that_is_set_is_told_and_the_duration_stays_right(watched: Watched) -> None:
    watched.after(1)
    watched.after(60)
    assert watched.told("clock") == []
    watched.after(5, wall=3600.0)
    (told,) = watched.told("clock")
    assert "set forward by 1 h 00 min" in told
    watched.after(5, wall=-7200.0)
    assert "set back by 2 h 00 min" in watched.told("clock")[1]
    history = read_history(watched.worker.paths)
    assert history.seconds is not None
    assert history.seconds == pytest.approx(3600.0, abs=60)  # the log's own clock was not set: 0 + 3600, by two shifts
    watched.after(5, asleep=600.0)
    assert "the machine slept for 10 min" in watched.told("clock")[2]


def test_main_memory_that_is_almost_full_is_told_and_explains_an_end_without_a_word(watched: Watched) -> None:
    paths = watched.worker.paths
    watched.steps(3)
    watched.after(5)
    assert crash_of(paths, read_history(paths)) is None
    watched.available = GIB // 2
    watched.after(5)
    watched.after(5)
    (told,) = watched.told(ALMOST_FULL)
    assert "0.5 of 16.0 GiB are available" in told
    found = crash_of(paths, read_history(paths))
    assert found is not None
    assert found.kind == "out_of_memory"
    assert "as when a guard of it (earlyoom, systemd-oomd) ends it; main memory is almost full: 0.5" in str(found)
    history = read_history(paths)
    assert history.last_at is not None
    history.last_at += 3600  # long after, it says nothing of the end
    assert crash_of(paths, history) is None


def test_a_disk_is_told_of_before_it_is_full(watched: Watched) -> None:
    watched.worker.emit(Saved, what="checkpoint", path="checkpoints/step-1", step=1, size_bytes=GIB)
    watched.after(5)
    assert watched.told("disk") == []
    watched.free = 2 * GIB
    watched.after(5)
    watched.after(5)
    (told,) = watched.told("disk")
    assert "2.00 GiB are free, and saving takes up to 2.06 GiB" in told
    watched.free = 500 * GIB
    watched.after(5)
    watched.free = GIB
    watched.after(5)
    assert len(watched.told("disk")) == 2


def test_a_disk_without_room_for_all_checkpoints_is_told_before_the_first_step(watched: Watched) -> None:
    watched.worker.emit(Started, job="train", recipe={"train": {"keep_checkpoints": 3}})
    watched.planned_on("", weights=GIB)  # 12 GiB each at most
    watched.free = 49 * GIB
    watched.after(5)
    assert watched.told("disk") == []
    watched.free = 48 * GIB
    watched.after(5)
    (told,) = watched.told("disk")
    assert "48.00 GiB are free, and saving takes up to 48.06 GiB" in told


def test_a_disk_that_something_fills_is_told_of_in_time(watched: Watched) -> None:
    watched.free = 100 * GIB
    for _ in range(100):
        watched.after(5)
        watched.free -= GIB // 4
    (told,) = watched.told("disk")
    assert "fills by 3.00 GiB a minute" in told


def test_what_fails_in_watching_does_not_reach_the_training(
    watched: Watched, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(event: object) -> None:
        raise ValueError("a fault of the watch")

    watched.worker.listeners.insert(0, fails)
    watched.steps(3)
    assert read_history(watched.worker.paths).last_step == 3
    assert "a fault of the watch" in capfd.readouterr().err
