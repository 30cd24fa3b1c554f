# ruff: noqa: S311  draws of a test are no secrets
"""Intervals: they hold the true value as often as they say, whatever the rows' lengths."""

import random

import pytest

from studio.core.intervals import Interval, quantile_interval, ratio_interval, student_t


def test_a_mean_per_token_is_the_sum_over_the_count() -> None:
    assert ratio_interval([3.0, 1.0], [2, 2]).value == 1.0


@pytest.mark.parametrize("rows", [8, 40, pytest.param(100, marks=pytest.mark.slow)])
def test_the_interval_holds_the_true_mean_nineteen_times_in_twenty(rows: int) -> None:
    # Rows of 5 to 60 tokens whose own means scatter (sd 1) around 2: the tokens of a row are alike.
    draw, held, trials = random.Random(rows), 0, 300
    for trial in range(trials):
        lengths = [draw.randint(5, 60) for _ in range(rows)]
        means = [draw.gauss(2.0, 1.0) for _ in range(rows)]
        found = ratio_interval([m * n for m, n in zip(means, lengths, strict=True)], lengths, seed=trial, resamples=400)
        assert found.low is not None and found.high is not None
        held += found.low <= 2.0 <= found.high
    # 300 trials of a fair 95 % interval give 0.95 +- 0.0126; three standard deviations, and as much bias for 8 rows.
    assert 0.95 - (0.075 if rows < 20 else 0.05) <= held / trials <= 0.99


def test_drawing_tokens_instead_of_rows_would_be_too_sure() -> None:
    draw = random.Random(1)
    means = [draw.gauss(2.0, 1.0) for _ in range(30)]
    by_row = ratio_interval([50 * mean for mean in means], [50] * 30)
    by_token = ratio_interval([mean for mean in means for _ in range(50)], [1] * 1500)
    assert width(by_row) > 5 * width(by_token)


def test_no_difference_has_no_sign_and_a_difference_has_one() -> None:
    draw = random.Random(2)
    half = [draw.gauss(0.0, 1.0) for _ in range(50)]
    noise = half + [-value for value in half]
    assert ratio_interval(noise, [1] * 100).sign == 0
    assert ratio_interval([value + 1 for value in noise], [1] * 100).sign == 1
    assert ratio_interval([value - 1 for value in noise], [1] * 100).sign == -1
    assert ratio_interval([0.0] * 50, [3] * 50) == Interval(0.0, 0.0, 0.0)


def test_one_row_gives_no_interval() -> None:
    assert ratio_interval([4.0], [2]) == Interval(2.0)
    assert Interval(2.0).sign == 0


def test_nothing_to_rest_on_is_refused() -> None:
    with pytest.raises(ValueError, match="wanted one row or more"):
        ratio_interval([], [])
    with pytest.raises(ValueError, match="no token"):
        quantile_interval([[]], 0.99)


def test_a_quantile_is_that_of_all_tokens() -> None:
    rows = [[float(i) for i in range(start, start + 100)] for start in range(0, 1000, 100)]
    found = quantile_interval(rows, 0.99)
    assert found.value == 989.0
    assert found.low is not None and found.high is not None
    assert found.low <= 989.0 <= found.high
    assert quantile_interval([[1.0], [5.0]], 0.5).value == 1.0


def test_the_interval_of_a_quantile_holds_the_true_one() -> None:
    # Exponential tokens: the 99th percentile of the population is ln 100.
    draw, held, trials = random.Random(3), 0, 200
    for trial in range(trials):
        found = quantile_interval(
            [[draw.expovariate(1.0) for _ in range(40)] for _ in range(60)], 0.99, seed=trial, resamples=200
        )
        assert found.low is not None and found.high is not None
        held += found.low <= 4.60517 <= found.high
    assert held / trials >= 0.9


@pytest.mark.parametrize(
    ("degrees", "table"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (100, 1.984)]
)
def test_students_t_is_that_of_the_tables(degrees: int, table: float) -> None:
    assert student_t(0.025, degrees) == pytest.approx(table, rel=0.01)


def width(interval: Interval) -> float:
    assert interval.low is not None and interval.high is not None
    return interval.high - interval.low
