"""Learning rates by step, and how many steps a run has."""

import pytest

from studio.core.schedule import learning_rate_at, total_steps_of


def rates(schedule: str, total: int = 100, warmup: float = 0.1) -> list[float]:
    return [
        learning_rate_at(step, total_steps=total, peak=1.0, schedule=schedule, warmup_fraction=warmup)  # type: ignore[arg-type]
        for step in range(1, total + 1)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_climbs_to_the_peak_and_every_step_moves(schedule: str) -> None:
    seen = rates(schedule)
    assert seen[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert max(seen) == 1.0
    assert min(seen) > 0


def test_falls_are_monotone_and_end_near_zero() -> None:
    for schedule in ("cosine", "linear"):
        fall = rates(schedule)[10:]
        assert fall == sorted(fall, reverse=True)
        assert fall[-1] < 0.02
    assert set(rates("constant")[10:]) == {1.0}


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_runs(warmup: float, total: int) -> None:
    assert all(0 < rate <= 1 for rate in rates("cosine", total, warmup))


def test_total_steps() -> None:
    assert total_steps_of(steps=7, epochs=3, rows=100, rows_per_step=8) == 7
    assert total_steps_of(steps=0, epochs=1, rows=100, rows_per_step=8) == 13
    assert total_steps_of(steps=0, epochs=0.5, rows=100, rows_per_step=8) == 7
    assert total_steps_of(steps=0, epochs=1, rows=1, rows_per_step=64) == 1
    # A step takes each row once at most: twenty epochs of four rows are twenty steps, not five.
    assert total_steps_of(steps=0, epochs=20, rows=4, rows_per_step=16) == 20
    assert total_steps_of(steps=0, epochs=0.5, rows=4, rows_per_step=16) == 1
