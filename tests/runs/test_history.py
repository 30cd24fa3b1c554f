import math

import pytest

from studio.core.events import (
    PAIR_FIGURES,
    Evaluated,
    Failed,
    Finished,
    Identified,
    MemorySeen,
    Paused,
    Phase,
    Planned,
    Sampled,
    Saved,
    Started,
    StepDone,
    Unknown,
    Warned,
)
from studio.runs.history import History


def _step(step: int, loss: float = 1.0, seconds: float = 0.5) -> StepDone:
    return StepDone(at=step, step=step, loss=loss, learning_rate=1e-4, grad_norm=0.5, tokens=100, seconds=seconds)


def _started(resumed_from: int = 0, total: int | None = 10) -> Started:
    return Started(at=0.0, job="train", total_steps=total, resumed_from=resumed_from)


def _evaluated(step: int, loss: float) -> Evaluated:
    return Evaluated(at=1.0, step=step, loss=loss, loss_tokens=10, rows=2, seconds=0.1)


def _sampled(step: int, index: int, answer: str = "a") -> Sampled:
    return Sampled(at=1.0, step=step, index=index, prompt="p", answer=answer, expected="e")


def _planned(total: int) -> Planned:
    return Planned(
        at=1.0,
        total_steps=total,
        trainable_parameters=1,
        rows=1,
        held_out_rows=1,
        device="cpu",
        dtype="bf16",
        loss_path="full",
    )


def test_an_empty_history_knows_nothing() -> None:
    history = History()
    assert history.last_step == 0
    assert history.total_steps is None
    assert history.tokens_per_second is None
    assert history.eta_seconds is None


def test_folding_in_parts_equals_folding_at_once() -> None:
    events = [_started(), _planned(10), *(_step(step) for step in range(1, 8)), _evaluated(5, 2.0), _sampled(5, 0)]
    at_once, in_parts = History(), History()
    at_once.fold(events)
    for event in events:
        in_parts.fold([event])
    assert at_once == in_parts


def test_a_run_takes_no_less_time_for_being_finished() -> None:
    history = History()
    assert history.seconds is None
    history.fold([_started(), _step(1), _step(90)])
    assert history.seconds == 90.0
    history.fold([Finished(at=95.0, outcome="done", step=90, seconds=45.0)])
    assert history.seconds == 95.0
    history.fold([Started(at=500.0, job="train", resumed_from=90), _step(503)])
    assert history.seconds == 98.0
    history.fold([Started(at=400.0, job="train", resumed_from=90)])  # the clock was set back
    assert history.seconds == 98.0


def test_speed_and_time_left_come_from_the_last_steps() -> None:
    history = History()
    history.fold([_started(total=100), *(_step(step, seconds=10.0) for step in range(1, 41))])
    history.fold(_step(step, seconds=0.5) for step in range(41, 61))
    assert history.tokens_per_second == 200
    assert history.eta_seconds == 20.0
    history.fold([Finished(at=1.0, outcome="done")])
    assert history.eta_seconds == 0.0


def test_the_plan_knows_the_steps_that_the_start_did_not() -> None:
    history = History()
    history.fold([_started(total=None)])
    assert history.total_steps is None
    history.fold([_planned(77)])
    assert history.total_steps == 77


def test_a_resumed_worker_replaces_the_steps_that_it_does_again() -> None:
    history = History()
    history.fold([_started(), *(_step(step, loss=9.0) for step in range(1, 9))])
    history.fold([_evaluated(0, 5.0), _evaluated(4, 4.0), _evaluated(8, 3.0)])
    history.fold([_sampled(0, 0), _sampled(8, 0), Saved(at=1.0, what="checkpoint", path="c", step=4)])
    history.fold([Saved(at=1.0, what="checkpoint", path="c", step=8), MemorySeen(at=1.0, step=8, stage="step")])
    history.fold([Failed(at=1.0, failure="x", message="m", advice="a")])
    history.fold([_started(resumed_from=4)])
    assert history.last_step == 4
    assert history.failed is None
    assert [event.step for event in history.evals] == [0, 4]
    assert [event.step for event in history.saved] == [4]
    assert [event.step for event in history.samples] == [0]
    assert len(history.memory.steps) == 0
    history.fold(_step(step, loss=1.0) for step in range(5, 11))
    assert list(history.train.steps) == list(range(1, 11))
    assert list(history.train.losses) == [9.0] * 4 + [1.0] * 6


def test_a_start_from_nothing_makes_all_before_it_void() -> None:
    history = History()
    history.fold([_started(), _evaluated(0, 5.0), _sampled(0, 0), _step(1), _step(2)])
    history.fold([_started()])
    assert (len(history.train.steps), history.evals, history.samples, history.last_step) == (0, [], [], 0)


def test_what_is_told_twice_counts_once() -> None:
    history = History()
    history.fold([_evaluated(4, 2.0), _evaluated(4, 1.5), _sampled(4, 0, "old"), _sampled(4, 1), _sampled(4, 0, "new")])
    assert [(event.step, event.loss) for event in history.evals] == [(4, 1.5)]
    assert [event.answer for event in history.samples] == ["a", "new"]


def test_a_memory_reading_that_is_not_available_is_a_gap() -> None:
    history = History()
    history.fold([MemorySeen(at=1.0, step=1, stage="step", resident_bytes=5)])
    assert math.isnan(history.memory.allocated_bytes[0])
    assert list(history.memory.resident_bytes) == [5.0]
    assert list(history.memory.steps) == [1]


def test_states_and_strangers() -> None:
    history = History()
    history.fold([Phase(at=3.0, name="load"), Paused(at=4.0, step=1, paused=True), Unknown(at=0.0, raw={})])
    assert history.phase is not None
    assert history.paused
    assert history.unknown == 1
    assert history.last_at == 4.0
    history.fold([_started()])
    assert (history.phase, history.paused) == (None, False)


def test_a_flood_of_warnings_is_bounded() -> None:
    history = History()
    history.fold(Warned(at=1.0, message=str(number)) for number in range(5000))
    assert len(history.warnings) == 1000


def test_loss_that_is_not_finite_stays_what_it_was() -> None:
    history = History()
    history.fold([_step(1, loss=math.nan), _step(2, loss=math.inf)])
    assert math.isnan(history.train.losses[0])
    assert history.train.losses[1] == math.inf


def test_what_a_run_was_made_from_is_no_unknown_line() -> None:
    history = History()
    history.fold([Started(at=1.0, job="train"), Identified(at=2.0, base={}, rows={})])
    assert history.unknown == 0


def test_figures_of_pairs_are_kept_step_by_step_and_dropped_with_their_steps() -> None:
    def step(number: int, margin: float | None) -> StepDone:
        accuracy = None if margin is None else 1.0
        return StepDone(
            at=1.0, step=number, loss=1.0, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0, margin=margin,
            accuracy=accuracy,
        )  # fmt: skip

    history = History()
    history.fold([step(1, None), step(2, 0.5), step(3, 0.7)])
    assert history.train.pairs.keys() == set(PAIR_FIGURES)
    assert math.isnan(history.train.pairs["margin"][0])
    assert list(history.train.pairs["margin"])[1:] == [0.5, 0.7]
    assert list(map(math.isnan, history.train.pairs["chosen_logp"])) == [True] * 3
    history.fold([Started(at=2.0, job="train", resumed_from=2, recipe={"train": {"objective": "dpo"}}), step(3, 0.9)])
    assert list(history.train.pairs["margin"])[1:] == [0.5, 0.9]
    assert len(history.train.pairs["accuracy"]) == len(history.train.steps)
    assert history.objective == "dpo"
    plain = History()
    plain.fold([step(1, None)])
    assert plain.train.pairs == {}
    assert plain.objective == "sft"


@pytest.mark.parametrize("recipe", [{}, {"train": 5}, {"train": {"objective": ["dpo"]}}])
def test_a_start_without_an_objective_is_a_supervised_one(recipe: dict[str, object]) -> None:
    history = History()
    history.fold([Started(at=2.0, job="train", recipe=recipe)])
    assert history.objective == "sft"
