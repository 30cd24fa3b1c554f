"""Sizes as polynomials of tokens, batch x length squared and rank, known before these numbers are.

Everything that a training step holds is such a polynomial, so a step is worked out once per model and set-up, and
after that a slider only puts numbers in.
"""

from collections.abc import Iterable
from typing import NamedTuple

_new = tuple.__new__
_MANY, _LONGEST_LAG = 1000, 200
"""Only lists longer than the first number are searched for steady rows, with periods shorter than the second."""


class Polynomial(NamedTuple):
    """`per_token*T + per_square*B*S*S + per_token_rank*T*r + per_rank*r + fixed`, with T = B*S tokens.

    A polynomial counts elements or bytes; whoever holds it says which.
    """

    per_token: float = 0
    per_square: float = 0
    per_token_rank: float = 0
    per_rank: float = 0
    fixed: float = 0

    # A new set-up makes a thousand of them. Made this way they take half the time of `Polynomial(...)`, which checks
    # its arguments.
    def plus(self, other: "Polynomial") -> "Polynomial":
        """Return the sum of two polynomials."""
        a, b, c, d, e = self
        f, g, h, i, j = other
        return _new(Polynomial, (a + f, b + g, c + h, d + i, e + j))

    def minus(self, other: "Polynomial") -> "Polynomial":
        """Return the difference of two polynomials."""
        a, b, c, d, e = self
        f, g, h, i, j = other
        return _new(Polynomial, (a - f, b - g, c - h, d - i, e - j))

    def times(self, factor: float) -> "Polynomial":
        """Return the polynomial multiplied by a number."""
        a, b, c, d, e = self
        return _new(Polynomial, (a * factor, b * factor, c * factor, d * factor, e * factor))

    def at(self, tokens: int, squares: int, rank: int) -> float:
        """Return the value for a micro-batch of `tokens` tokens, `squares` = batch x length x length, and a rank."""
        return self[0] * tokens + self[1] * squares + (self[2] * tokens + self[3]) * rank + self[4]

    def at_least_nothing(self) -> "Polynomial":
        """Return the polynomial without its negative parts: it never falls when a batch, a length or a rank grows."""
        return Polynomial(*(max(0, value) for value in self))

    def covers(self, other: "Polynomial") -> bool:
        """Whether this polynomial is at least the other for every batch, length and rank."""
        a, b, c, d, e = self
        f, g, h, i, j = other
        return a >= f and b >= g and c >= h and d >= i and e >= j


NOTHING = Polynomial()
_ROUNDING = Polynomial(*[1e-6] * 5)
"""Rounding error that the sum of a million terms may have, in bytes."""


def total(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Return the sum of polynomials."""
    result = NOTHING
    for polynomial in polynomials:
        result = result.plus(polynomial)
    return result


class Ranked(NamedTuple):
    """A polynomial whose rank is known: `per_token*T + per_square*B*S*S + fixed`."""

    per_token: float
    per_square: float
    fixed: float


class Heights(NamedTuple):
    """Several sets of polynomials whose rank is known, laid end to end: one pass finds the largest of each set.

    Attributes:
        polynomials: The polynomials of all sets.
        sets: Where each set lies among them.
    """

    polynomials: tuple[Ranked, ...]
    sets: tuple[slice, ...]

    def at(self, tokens: int, squares: int) -> list[float]:
        """Return the largest value of each set for a micro-batch."""
        values = [a * tokens + b * squares + c for a, b, c in self.polynomials]
        return [max(values[part]) for part in self.sets]


def heights(sets: Iterable[Iterable[Polynomial]], rank: int) -> Heights:
    """Return sets of polynomials for a rank; the largest of an empty set is 0."""
    polynomials: list[Ranked] = []
    places = []
    for each in sets:
        first = len(polynomials)
        polynomials += ranked(each, rank) or (Ranked(0, 0, 0),)
        places.append(slice(first, len(polynomials)))
    return Heights(tuple(polynomials), tuple(places))


def ranked(polynomials: Iterable[Polynomial], rank: int) -> tuple[Ranked, ...]:
    """Return the polynomials that can be the largest for some batch and length at this rank.

    They are far fewer than those that `uncovered` keeps, which can be the largest at any rank.
    """
    kept: list[Ranked] = []
    known = {Ranked(a + c * rank, b, d * rank + e) for a, b, c, d, e in polynomials}
    for polynomial in sorted(known, key=sum, reverse=True):
        a, b, e = polynomial
        for f, g, j in kept:
            if f >= a and g >= b and j >= e:
                break
        else:
            kept.append(polynomial)
    return tuple(kept)


def uncovered(polynomials: Iterable[Polynomial]) -> tuple[Polynomial, ...]:
    """Return the polynomials that can be the largest for some batch, length and rank; the rest are never the peak."""
    kept: list[Polynomial] = []
    for polynomial in sorted(set(_without_middles(list(polynomials))), key=sum, reverse=True):
        for other in kept:
            if other.covers(polynomial):
                break
        else:
            kept.append(polynomial)
    return tuple(kept)


def _without_middles(row: list[Polynomial]) -> list[Polynomial]:
    """Return the polynomials without those that repeat with a steady rise or fall and have others on both sides.

    The mean of two is never above the larger of them, whatever the batch: of such a row only its ends can be largest.
    Hundreds of experts, one module after another, leave many thousand marks of which each trades tokens against ranks.
    """
    if len(row) <= _MANY:
        return row
    # A layer is computed again, then goes backward: both halves repeat, each with a period of its own.
    lags = {_lag(row, quarter * len(row) // 4) for quarter in (1, 2, 3)} - {0}
    return [each for at, each in enumerate(row) if not any(_is_middle(row, at, lag) for lag in lags)]


def _is_middle(row: list[Polynomial], at: int, lag: int) -> bool:
    """Return whether a polynomial is at most the mean of those a period before and after it."""
    inside = lag <= at < len(row) - lag
    return inside and row[at - lag].plus(row[at + lag]).plus(_ROUNDING).covers(row[at].times(2))


def _lag(row: list[Polynomial], place: int) -> int:
    """Return the period with which a list repeats before a place, plus a steady step; 0 where it does not repeat.

    One period is not enough to tell: equal polynomials side by side in a long period would look like a short one.
    """
    for lag in range(1, min(_LONGEST_LAG, place // 2, len(row) - place)):
        begin = max(lag, place - _LONGEST_LAG)
        if all(_steady(row[at - lag], row[at], row[at + lag]) for at in range(begin, place)):
            return lag
    return 0


def _steady(before: Polynomial, polynomial: Polynomial, after: Polynomial) -> bool:
    bent = before.plus(after).minus(polynomial.times(2))
    return _ROUNDING.covers(bent) and _ROUNDING.covers(bent.times(-1))


def largest(polynomials: Iterable[Polynomial], tokens: int, squares: int, rank: int) -> float:
    """Return the largest value of any of the polynomials, 0 when there is none."""
    return max([a * tokens + b * squares + (c * tokens + d) * rank + e for a, b, c, d, e in polynomials], default=0)
