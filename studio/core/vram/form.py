"""Sizes that are known before the batch is: linear forms in tokens, in batch x length squared and in rank.

Everything a training step holds is such a form, so a step is worked out once per model and set-up, and after that a
slider only puts numbers in.
"""

from collections.abc import Iterable
from typing import NamedTuple

_new = tuple.__new__
_MANY, _LONGEST_LAG = 1000, 200
"""From how many forms on steady rows are looked for, and after how many forms one may go on."""


class Form(NamedTuple):
    """`per_token*T + per_square*B*S*S + per_token_rank*T*r + per_rank*r + fixed`, with T = B*S tokens.

    A form counts elements or bytes; whoever holds it says which.
    """

    per_token: float = 0
    per_square: float = 0
    per_token_rank: float = 0
    per_rank: float = 0
    fixed: float = 0

    # A new set-up makes a thousand forms: these take half the time of `Form(...)`, which checks names and defaults.
    def plus(self, other: "Form") -> "Form":
        """Return the sum of two forms."""
        a, b, c, d, e = self
        f, g, h, i, j = other
        return _new(Form, (a + f, b + g, c + h, d + i, e + j))

    def minus(self, other: "Form") -> "Form":
        """Return the difference of two forms."""
        a, b, c, d, e = self
        f, g, h, i, j = other
        return _new(Form, (a - f, b - g, c - h, d - i, e - j))

    def times(self, factor: float) -> "Form":
        """Return the form multiplied by a number."""
        a, b, c, d, e = self
        return _new(Form, (a * factor, b * factor, c * factor, d * factor, e * factor))

    def at(self, tokens: int, squares: int, rank: int) -> float:
        """Return the value for a micro-batch of `tokens` tokens, `squares` = batch x length x length, and a rank."""
        return self[0] * tokens + self[1] * squares + (self[2] * tokens + self[3]) * rank + self[4]

    def at_least_nothing(self) -> "Form":
        """Return the form without its negative parts: it never falls when a batch, a length or a rank grows."""
        return Form(*(max(0, value) for value in self))

    def covers(self, other: "Form") -> bool:
        """Whether this form is at least the other for every batch, length and rank."""
        a, b, c, d, e = self
        f, g, h, i, j = other
        return a >= f and b >= g and c >= h and d >= i and e >= j


NOTHING = Form()
_ROUNDING = Form(*[1e-6] * 5)
"""What sums of a million may be off, in bytes."""


def total(forms: Iterable[Form]) -> Form:
    """Return the sum of forms."""
    result = NOTHING
    for form in forms:
        result = result.plus(form)
    return result


class Ranked(NamedTuple):
    """A form whose rank is known: `per_token*T + per_square*B*S*S + fixed`."""

    per_token: float
    per_square: float
    fixed: float


class Heights(NamedTuple):
    """Several sets of forms whose rank is known, laid end to end: one pass finds the largest of each set.

    Attributes:
        forms: The forms of all sets.
        sets: Where each set lies among them.
    """

    forms: tuple[Ranked, ...]
    sets: tuple[slice, ...]

    def at(self, tokens: int, squares: int) -> list[float]:
        """Return the largest value of each set for a micro-batch."""
        values = [a * tokens + b * squares + c for a, b, c in self.forms]
        return [max(values[part]) for part in self.sets]


def heights(sets: Iterable[Iterable[Form]], rank: int) -> Heights:
    """Return sets of forms for a rank; the largest of an empty set is 0."""
    forms: list[Ranked] = []
    places = []
    for each in sets:
        first = len(forms)
        forms += ranked(each, rank) or (Ranked(0, 0, 0),)
        places.append(slice(first, len(forms)))
    return Heights(tuple(forms), tuple(places))


def ranked(forms: Iterable[Form], rank: int) -> tuple[Ranked, ...]:
    """Return the forms for a rank that can be the largest for some batch and length: far fewer than for any rank."""
    kept: list[Ranked] = []
    known = {Ranked(a + c * rank, b, d * rank + e) for a, b, c, d, e in forms}
    for form in sorted(known, key=sum, reverse=True):
        a, b, e = form
        for f, g, j in kept:
            if f >= a and g >= b and j >= e:
                break
        else:
            kept.append(form)
    return tuple(kept)


def uncovered(forms: Iterable[Form]) -> tuple[Form, ...]:
    """Return the forms that can be the largest for some batch, length and rank; the rest can never be the peak."""
    kept: list[Form] = []
    for form in sorted(set(_without_middles(list(forms))), key=sum, reverse=True):
        for other in kept:
            if other.covers(form):
                break
        else:
            kept.append(form)
    return tuple(kept)


def _without_middles(forms: list[Form]) -> list[Form]:
    """Return the forms without those that repeat with a steady rise or fall and have others on both sides.

    The mean of two is never above the larger of them, whatever the batch: of such a row only its ends can be largest.
    Hundreds of experts, one module after another, leave many thousand marks of which each trades tokens against ranks.
    """
    if len(forms) <= _MANY:
        return forms
    # A layer computed again, then going backward, has a step of its own in each half.
    lags = {_lag(forms, quarter * len(forms) // 4) for quarter in (1, 2, 3)} - {0}
    return [form for at, form in enumerate(forms) if not any(_is_middle(forms, at, lag) for lag in lags)]


def _is_middle(forms: list[Form], at: int, lag: int) -> bool:
    inside = lag <= at < len(forms) - lag
    return inside and forms[at - lag].plus(forms[at + lag]).plus(_ROUNDING).covers(forms[at].times(2))


def _lag(forms: list[Form], place: int) -> int:
    """Return after how many forms a list goes on as before around a place, but for a steady step; 0 where never."""
    for lag in range(1, min(_LONGEST_LAG, place, (len(forms) - place) // 2)):
        if all(_steady(forms[at - lag], forms[at], forms[at + lag]) for at in range(place, place + lag)):
            return lag
    return 0


def _steady(before: Form, form: Form, after: Form) -> bool:
    bent = before.plus(after).minus(form.times(2))
    return _ROUNDING.covers(bent) and _ROUNDING.covers(bent.times(-1))


def largest(forms: Iterable[Form], tokens: int, squares: int, rank: int) -> float:
    """Return the largest value of any of the forms, 0 when there is none."""
    return max([a * tokens + b * squares + (c * tokens + d) * rank + e for a, b, c, d, e in forms], default=0)
