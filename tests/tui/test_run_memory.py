"""The memory of a run on the screen: predicted beside measured, as a line, a gauge and a table by stage."""

import json
from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.events import (
    Finished,
    MemorySeen,
    Planned,
    Started,
)
from studio.core.gpu_catalogue import GIB
from studio.runs.history import History
from studio.tui.app import StudioApp
from studio.tui.panels.run_memory import PeakGauge, StagePeaks, planned_reading, planned_stages, table_text
from tests.fakes.runs import LiveWorker
from tests.tui.stories import (
    make_run,
    play,
    settle,
    shown,
    text_of,
    train,
)
from widgets.gauge_picture import figure
from widgets.line_plot import LinePlot


def test_a_prediction_is_drawn(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text('{"peak_bytes": 8589934592}')
    with LiveWorker(paths) as worker:
        train(worker, range(1, 10))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            memory = app.screen.query_one("#memory-plot", LinePlot)
            assert "predicted peak 8.0" in text_of(memory)
            assert "╌╌╌╌" in text_of(memory)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, size=(160, 50), open_run=paths)


PLAN = {
    "peak_bytes": 6 * 2**30,
    "components": {"base": 5 * 2**30, "activations": 2**30, "context": 2**29},
    "ranges": {"allocated": {"low": 5 * 2**30, "expected": 6 * 2**30, "high": 7 * 2**30}},
}


@pytest.mark.parametrize(("factor", "verdict"), [(1, "in the range"), (0.5, "100% over"), (2, "50% under")])
def test_the_measured_peak_stands_beside_the_predicted_one(tmp_path: Path, factor: float, verdict: str) -> None:
    paths = make_run(tmp_path)
    plan = json.loads(json.dumps(PLAN), parse_int=lambda number: int(int(number) * factor))
    paths.plan.write_text(json.dumps(plan))
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            row = next(line for line in shown(app).splitlines() if line.startswith(" peak "))
            assert "█" in row
            assert f"{figure(6 * factor)} GiB" in row
            assert "measured 6.00" in row
            assert verdict in row
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


def test_a_run_on_the_cpu_is_not_measured_against_a_card(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text(json.dumps(PLAN))
    with LiveWorker(paths) as worker:
        worker.emit(Started, job="train", method="lora", model="embedded")
        worker.emit(
            Planned,
            total_steps=9,
            trainable_parameters=1,
            rows=9,
            held_out_rows=1,
            device="cpu",
            dtype="fp32",
            loss_path="full",
        )

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            assert not app.screen.query_one(PeakGauge).display
            assert "predicted" not in shown(app)
            worker.emit(Finished, outcome="done")

        play(story, tmp_path, open_run=paths)


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "{}", '{"components": {"base": "x"}}', '{"components": {"base": 1}, "ranges": {"allocated": []}}'],
)
def test_a_damaged_plan_shows_no_gauge(tmp_path: Path, damage: str) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text(damage)
    assert planned_reading(paths) is None


STAGES = {"load": 4, "forward": 5, "loss": 6, "backward": 5.5, "optimizer": 4.5, "eval": 4, "save": 4}
PLANNED = {name: int(size * GIB) for name, size in STAGES.items()}


def memory(step: int, stage: str, peak_gib: float | None) -> MemorySeen:
    peak = None if peak_gib is None else int(peak_gib * GIB)
    return MemorySeen(at=0.0, step=step, stage=stage, peak_bytes=peak)


def peaks_of(*readings: MemorySeen) -> StagePeaks:
    history, peaks = History(), StagePeaks()
    history.fold(readings)
    peaks.take(history)
    return peaks


def test_stages_that_were_measured_together_stand_together() -> None:
    rows = peaks_of(
        memory(0, "load", 4.2), memory(1, "backward", 6.3), memory(1, "step", 4.5), memory(2, "step", 6.2)
    ).rows(PLANNED)
    found = {row.stages: row.measured and round(row.measured / GIB, 1) for row in rows}
    assert found == {
        ("load",): 4.2,
        ("forward", "loss", "backward"): 6.3,
        ("optimizer",): 4.5,
        ("eval",): None,
        ("save",): None,
        ("later steps",): 6.2,
    }
    together = next(row for row in rows if "loss" in row.stages)
    assert together.off == pytest.approx(0.05)


def test_peaks_follow_reading_by_reading_and_begin_anew_after_a_resume() -> None:
    history, peaks = History(), StagePeaks()
    history.fold([Started(at=0.0, job="train"), memory(1, "backward", 6.0)])
    peaks.take(history)
    history.fold([memory(2, "step", 7.0)])
    peaks.take(history)
    assert peaks.highest == 7 * GIB
    history.fold([Started(at=1.0, job="train", resumed_from=1), memory(2, "backward", 5.0)])
    peaks.take(history)
    again = StagePeaks()
    again.take(history)
    assert peaks.rows(PLANNED) == again.rows(PLANNED)


def test_the_table_by_stage_is_a_view(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text(json.dumps({"stages": PLANNED}))
    with LiveWorker(paths) as worker:
        train(worker, range(1, 4))
        worker.emit(MemorySeen, step=4, stage="eval", peak_bytes=int(4.4 * GIB))

        async def story(pilot: Pilot[None], app: StudioApp) -> None:
            await pilot.press("5")
            await settle(pilot)
            table = " ".join(shown(app).split())
            assert "eval 4.0 4.4 +10%" in table
            assert "later steps 6.0 6.0 +0%" in table
            assert "bracketed ones are measured together" in table

        play(story, tmp_path, open_run=paths)
        worker.emit(Finished, outcome="done")


def test_a_cpu_run_says_why_nothing_is_measured() -> None:
    history, peaks = History(), StagePeaks()
    planned = {"total_steps": 1, "trainable_parameters": 1, "rows": 1, "held_out_rows": 1}
    history.fold(
        [
            Planned(at=0.0, device="cpu", dtype="fp32", loss_path="chunked", **planned),
            MemorySeen(at=0.0, step=0, stage="load", resident_peak_bytes=2 * GIB),
        ]
    )
    peaks.take(history)
    text = table_text(peaks.rows(PLANNED), history).plain
    assert "A CPU counts no tensors" in text
    assert "2.0 GiB" in text
    assert "bracketed" not in text, "nothing is bracketed"
    assert table_text([], history).plain == "This run has no estimate by stage."


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"stages": 3}', '{"stages": {"load": "much", "loss": -1, "eval": true}}']
)
def test_a_damaged_plan_has_no_stages(tmp_path: Path, damage: str) -> None:
    paths = make_run(tmp_path)
    paths.plan.write_text(damage)
    assert planned_stages(paths) == {}
