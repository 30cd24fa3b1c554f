"""Confidence intervals: how far a figure would move if other rows had been held out, or other prompts asked.

Means and quantiles are bootstrapped. The tokens of one row are alike, so rows are drawn, not tokens. For few rows the
percentiles are widened, as Student's t is wider than the normal distribution (Hesterberg 2015, "What Teachers Should
Know About the Bootstrap", expanded percentile interval). Shares have formulas instead: where all answers are right, or
all are wrong, a bootstrap would give an interval of no width.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

RESAMPLES = 1000
LEVEL = 0.95
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the ends of its 95 % confidence interval; the ends are None where there are fewer than two rows."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def negated(self) -> "Interval":
        """The interval of the same difference with its sign turned."""
        return Interval(-self.value, None if self.high is None else -self.high, None if self.low is None else -self.low)

    @property
    def sign(self) -> int:
        """1 where the whole interval is above zero, -1 where it is below, 0 where it holds zero or has no ends."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def ratio_interval(
    sums: Sequence[float], counts: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return sum over count with its interval: a mean per token where rows have different lengths.

    Args:
        sums: The sum of each row. For a paired interval, the difference of two models on the same row.
        counts: The tokens of each row.
        seed: The seed of the draws.
        resamples: How often rows are drawn.

    Raises:
        ValueError: No row has a token, or there are not as many sums as counts.
    """
    total = math.fsum(counts)
    if len(sums) != len(counts) or total <= 0:
        raise ValueError(f"found {len(sums)} sums and {len(counts)} counts with {total} tokens; wanted one row or more")
    pairs = list(zip(sums, counts, strict=True))

    def drawn(rows: Sequence[int]) -> float:
        picked = [pairs[row] for row in rows]
        tokens = math.fsum(count for _, count in picked)
        return math.fsum(part for part, _ in picked) / tokens if tokens else math.nan

    return _interval(math.fsum(sums) / total, len(pairs), drawn, seed, resamples)


def quantile_interval(
    rows: Sequence[Sequence[float]], share: float, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return a quantile over the tokens of all rows with its interval.

    Args:
        rows: A figure per token, row by row.
        share: The share of tokens at or below the quantile, 0 to 1.
        seed: The seed of the draws.
        resamples: How often rows are drawn.

    Raises:
        ValueError: There is no token.
    """
    ordered = sorted(((value, place) for place, row in enumerate(rows) for value in row), reverse=True)
    if not ordered:
        raise ValueError("found no token; wanted one or more")
    lengths = [len(row) for row in rows]

    def drawn(picked: Sequence[int]) -> float:
        times = [0] * len(rows)
        for place in picked:
            times[place] += 1
        above = (1 - share) * sum(times[place] * lengths[place] for place in range(len(rows)))
        passed = 0.0
        for value, place in ordered:  # from the top: a high quantile is found within a few tokens
            passed += times[place]
            if passed > above:
                return value
        return ordered[-1][0]

    return _interval(drawn(range(len(rows))), len(rows), drawn, seed, resamples)


def share_interval(hits: Sequence[bool]) -> Interval:
    """Return the share of hits with its 95 % interval (Wilson 1927, JASA 22: the score interval).

    Raises:
        ValueError: There is nothing to count.
    """
    count = len(hits)
    if not count:
        raise ValueError("found no answer; wanted one or more")
    share = sum(hits) / count
    if count == 1:
        return Interval(share)
    middle = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    whole = 1 + _Z**2 / count
    # With all hits or none one bound is the share itself, which rounding must not pass.
    return Interval(share, min(share, max(0.0, (middle - half) / whole)), max(share, min(1.0, (middle + half) / whole)))


def paired_interval(hits: Sequence[bool], others: Sequence[bool]) -> Interval:
    """Return how much larger a share is than another one on the same questions, with its 95 % interval.

    The adjusted Wald interval, which adds one question of each kind on which the two differ (Bonett and Price 2012,
    J. Educ. Behav. Stat. 37(4)).

    Raises:
        ValueError: There are not as many answers of both, or there are none.
    """
    count = len(hits)
    if count != len(others) or not count:
        raise ValueError(f"found {count} and {len(others)} answers; wanted as many of both, one or more")
    won = sum(one and not other for one, other in zip(hits, others, strict=True))
    lost = sum(other and not one for one, other in zip(hits, others, strict=True))
    value = (won - lost) / count
    if count == 1:
        return Interval(value)
    up, down = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    middle, half = up - down, _Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Interval(value, max(-1.0, min(value, middle - half)), min(1.0, max(value, middle + half)))


def student_t(tail: float, degrees: int) -> float:
    """Return the value that Student's t exceeds with probability `tail`.

    Exact for one and two degrees of freedom; from three on by Fisher's series in 1 / degrees, within 1 % of the tables.
    """
    if degrees == 1:
        return 1 / math.tan(math.pi * tail)
    if degrees == 2:
        middle = 4 * tail * (1 - tail)
        return (1 - 2 * tail) * math.sqrt(2 / middle)
    z = _NORMAL.inv_cdf(1 - tail)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees ** (power + 1) for power, term in enumerate(terms))


def _interval(value: float, rows: int, drawn: Callable[[Sequence[int]], float], seed: int, resamples: int) -> Interval:
    if rows < 2:
        return Interval(value)
    draw = random.Random(seed)  # noqa: S311  statistics, no secret
    figures = sorted(
        figure for _ in range(resamples) if not math.isnan(figure := drawn(draw.choices(range(rows), k=rows)))
    )
    tail = (1 - LEVEL) / 2
    # For few rows this is further out than 2.5 %: the percentiles are taken there.
    wider = _NORMAL.cdf(-math.sqrt(rows / (rows - 1)) * student_t(tail, rows - 1))
    return Interval(value, _at(figures, wider), _at(figures, 1 - wider))


def _at(ordered: Sequence[float], share: float) -> float:
    """Return a quantile of sorted figures, interpolated between two of them."""
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2)
    return ordered[below] + (place - below) * (ordered[below + 1] - ordered[below])
