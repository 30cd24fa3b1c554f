"""Confidence intervals of shares: how many of some answers are right, and whether two models differ in it.

A bootstrap of answers that are all right, or all wrong, would be sure of itself; these intervals are not.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

from studio.core.intervals import LEVEL, Interval

_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


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
    # At both ends one bound is the share itself, which rounding must not pass.
    return Interval(share, min(share, max(0.0, (middle - half) / whole)), max(share, min(1.0, (middle + half) / whole)))


def paired_interval(hits: Sequence[bool], others: Sequence[bool]) -> Interval:
    """Return how much larger a share is than another one on the same questions, with its 95 % interval.

    Adjusted Wald: one more question of each discordant kind (Bonett and Price 2012, J. Educ. Behav. Stat. 37(4)).

    Raises:
        ValueError: The questions are not the same, or there are none.
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
