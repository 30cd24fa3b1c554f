"""What a run's screen says of its end and of pages that stay empty: once, and no more than is known."""

from dataclasses import replace
from pathlib import Path

import pytest

from studio.core.events import (
    Evaluated,
    Finished,
    Planned,
    Started,
    StepDone,
)
from studio.runs.history import History
from studio.runs.status import Status
from studio.tui.panels.outcome import outcome_text
from studio.tui.panels.samples import why_none
from tests.tui.stories import (
    make_run,
)


@pytest.mark.parametrize(
    ("evals", "held_out", "status", "why"),
    [
        (0, 5, Status.running, "No samples yet"),
        (1, 5, Status.running, "No samples yet"),
        (2, 5, Status.running, "eval.samples is 0"),
        (1, 5, Status.finished, "eval.samples is 0"),
        (1, 5, Status.stopped, "ended before the first"),
        (0, 0, Status.running, "no row is held out"),
    ],
)
def test_an_empty_page_of_samples_says_why(evals: int, held_out: int, status: Status, why: str) -> None:
    history = History()
    planned = Planned(
        at=1.0, total_steps=9, trainable_parameters=1, rows=9, held_out_rows=held_out, device="cpu", dtype="fp32",
        loss_path="chunked",
    )  # fmt: skip
    measured = [Evaluated(at=2.0, step=step, loss=1.0, loss_tokens=9, rows=5, seconds=1.0) for step in range(evals)]
    history.fold([Started(at=1.0, job="train"), planned, *measured])
    assert why in why_none(history, status)


@pytest.mark.parametrize(
    ("evaluated", "words"),
    [((0,), "held-out loss 4.000 at step 0, not measured since"), ((0, 4), "held-out loss 4.000 -> 3.000")],
)
def test_a_held_out_loss_that_was_measured_once_is_no_progress(
    tmp_path: Path, evaluated: tuple[int, ...], words: str
) -> None:
    paths = make_run(tmp_path)
    history = History()
    history.fold([Started(at=1.0, job="train"), Finished(at=9.0, outcome="stopped", step=4)])
    for step in evaluated:
        loss = 4.0 if step == 0 else 3.0
        history.fold([Evaluated(at=2.0, step=step, loss=loss, loss_tokens=9, rows=1, seconds=1.0)])
    assert words in outcome_text(paths, history, Status.stopped).plain


def test_an_only_measurement_before_training_is_told_once(tmp_path: Path) -> None:
    history = History()
    step = StepDone(at=3.0, step=1, loss=2.0, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=1.0)
    history.fold(
        [
            Started(at=1.0, job="train"),
            Evaluated(at=2.0, step=0, loss=4.0, loss_tokens=9, rows=1, seconds=1.0),
            step,
            Finished(at=9.0, outcome="stopped", step=1),
        ]
    )
    head, told = outcome_text(make_run(tmp_path), history, Status.stopped).plain.splitlines()[:2]
    assert head == "stopped after 1 step in 8 s  held-out loss 4.000 at step 0"
    assert told == "The held-out loss was measured before training only: whether it improved is not known."


@pytest.mark.parametrize(("outcome", "word"), [("done", "done"), ("stopped", "stopped")])
def test_another_job_that_was_stopped_is_not_called_done(tmp_path: Path, outcome: str, word: str) -> None:
    history = History()
    history.fold([Started(at=1.0, job="merge"), Finished(at=2.0, outcome=outcome)])
    assert outcome_text(make_run(tmp_path), history, Status.stopped).plain.startswith(word)


def test_a_run_that_taught_nothing_says_what_to_try_next(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    history = History()
    started, finished = Started(at=1.0, job="train"), Finished(at=9.0, outcome="done", step=4)
    planned = Planned(
        at=1.0, total_steps=4, trainable_parameters=1, rows=45, held_out_rows=15, device="cpu", dtype="fp32",
        loss_path="chunked",
    )  # fmt: skip
    step = StepDone(at=3.0, step=4, loss=2.0, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=1.0)
    gain = {"value": -0.001, "low": -0.02, "high": 0.018}
    ends = [
        Evaluated(at=2.0, step=at, loss=2.0, loss_tokens=300, rows=15, seconds=1.0, gain=gain if at else None)
        for at in (0, 4)
    ]
    history.fold([started, planned, ends[0], step, ends[1], finished])
    told = outcome_text(paths, history, Status.finished).plain
    assert "did not improve beyond noise" in told and "\nTry next: raise the learning rate from " in told
    better = replace(ends[1], gain={"value": -0.5, "low": -0.6, "high": -0.4})
    history.fold([better])
    assert "Try next" not in outcome_text(paths, history, Status.finished).plain
