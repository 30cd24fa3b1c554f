# ruff: noqa: S311  draws of a test are no secrets
"""Intervals of shares: they hold the true share as often as they say, and are unsure where all answers are alike."""

import random

import pytest

from studio.core.intervals import Interval, paired_interval, share_interval


@pytest.mark.parametrize(("count", "share"), [(10, 0.5), (20, 0.1), (40, 0.95), (100, 0.3)])
def test_the_interval_holds_the_true_share_nineteen_times_in_twenty(count: int, share: float) -> None:
    draw, held, trials = random.Random(count), 0, 2000
    for _ in range(trials):
        found = share_interval([draw.random() < share for _ in range(count)])
        assert found.low is not None and found.high is not None
        held += found.low <= share <= found.high
    # Shares come in steps of 1 / count, so the coverage jumps around 0.95: Brown, Cai, DasGupta 2001, figure 5.
    assert 0.91 <= held / trials <= 0.99


@pytest.mark.parametrize(
    ("count", "both", "first", "second"), [(12, 0.4, 0.2, 0.2), (30, 0.5, 0.3, 0.1), (60, 0.8, 0.05, 0.02)]
)
def test_the_interval_holds_the_true_difference(count: int, both: float, first: float, second: float) -> None:
    draw, held, trials = random.Random(count), 0, 2000
    for _ in range(trials):
        kinds = draw.choices(
            ["both", "first", "second", "none"], [both, first, second, 1 - both - first - second], k=count
        )
        found = paired_interval(
            [kind in ("both", "first") for kind in kinds], [kind in ("both", "second") for kind in kinds]
        )
        assert found.low is not None and found.high is not None
        held += found.low <= first - second <= found.high
    assert 0.93 <= held / trials <= 0.995


def test_two_equal_models_are_rarely_called_different() -> None:
    draw, called, trials = random.Random(5), 0, 2000
    for _ in range(trials):
        one, other = ([draw.random() < 0.5 for _ in range(20)] for _ in range(2))
        called += paired_interval(one, other).sign != 0
    assert called / trials <= 0.06


def test_a_real_difference_is_seen_and_its_mirror_too() -> None:
    right, wrong = [True] * 15 + [False] * 5, [False] * 18 + [True] * 2
    assert paired_interval(right, wrong).sign == 1
    assert paired_interval(wrong, right).sign == -1
    assert paired_interval(right, right).sign == 0


def test_answers_that_are_all_alike_leave_doubt() -> None:
    none, every = share_interval([False] * 10), share_interval([True] * 10)
    assert none.low == 0.0 and none.high == pytest.approx(0.2775, abs=1e-3)  # Wilson: z^2 / (n + z^2)
    assert every.high == 1.0 and every.low == pytest.approx(0.7225, abs=1e-3)
    same = paired_interval([False] * 10, [False] * 10)
    assert same.low is not None and same.high is not None
    assert same.low < -0.1 < 0 < 0.1 < same.high


def test_one_answer_gives_no_interval_and_none_is_refused() -> None:
    assert share_interval([True]) == Interval(1.0)
    assert paired_interval([True], [False]) == Interval(1.0)
    with pytest.raises(ValueError, match="one or more"):
        share_interval([])
    with pytest.raises(ValueError, match="as many of both"):
        paired_interval([True], [])
