"""What is unlike the steps before: losses that leap up and stay up, and steps that take far longer.

Loss and time of a step depend on its rows, so a single one means nothing. What is looked for is several in a row that
lie far outside of what the steps before were like.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

_WINDOW = 64
"""Steps of which the usual loss is the median."""
_LEAST = 20
"""Steps that must have been seen before anything is called unusual."""
_IN_A_ROW = 3
_FEW = 5
"""Losses whose median says whether a step lay in a climb."""
_DEVIATIONS = 6.0
"""Standard deviations above the median, by the median absolute deviation, which single outliers do not widen."""
_LEAST_RISE = 0.25
"""A spike is at least this share of the median above it: of losses that hardly vary, six deviations are nothing."""
_NORMAL = 1.4826
"""By this the median absolute deviation of normal values gives their standard deviation."""
_FIRST = 5
"""Steps whose time is not looked at: kernels are loaded in them, and memory is taken for the first time."""
_SLOW_STEPS = 8
"""Steps whose median is slow: a step after an evaluation or a checkpoint may be by itself."""
_SLOWER, _AS_BEFORE = 2.0, 1.3
"""Times the usual seconds a token at which steps are slow, and at which they are no longer."""
_LEAST_SECONDS = 0.05
"""Shorter steps are not looked at: any other program changes their time."""


@dataclass(frozen=True, slots=True)
class Spike:
    """Losses that leapt up.

    Attributes:
        step: The step since which losses were higher than usual, at the latest the first that leapt up.
        loss: The mean of those that leapt up.
        usual: The median before.
    """

    step: int
    loss: float
    usual: float


@dataclass(slots=True)
class LossSpikes:
    """Follows the losses of a training, step by step."""

    _usual: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _high: list[tuple[int, float]] = field(default_factory=list)
    _calm: int = _IN_A_ROW

    def see(self, step: int, loss: float) -> Spike | None:
        """Take in a step's loss; return a spike at the step at which it is known to be one, and once only.

        After a spike the next one can be told once as many losses as make one were usual again.
        """
        if not math.isfinite(loss):
            return None  # a guard ends the run
        if len(self._usual) < _LEAST or loss <= self._limit():
            self._usual.append((step, loss))
            self._high.clear()
            self._calm += 1
            return None
        if self._calm < _IN_A_ROW:
            self._calm = 0
            return None
        self._high.append((step, loss))
        if len(self._high) < _IN_A_ROW:
            return None
        self._calm = 0
        mean = statistics.fmean(high for _, high in self._high)
        usual = statistics.median(loss for _, loss in self._usual)
        return Spike(self._began(usual), mean, usual)

    def _began(self, usual: float) -> int:
        """Return the step since which the median of a few losses was high: some climb before they leap."""
        first, before = self._high[0][0], list(self._usual)
        limit = usual + _LEAST_RISE * abs(usual)
        while len(before) > _FEW and statistics.median(loss for _, loss in before[-_FEW:]) > limit:
            first = before[-(_FEW // 2) - 1][0]  # the middle one: at least half of the others are high too
            before.pop()
        return first

    def _limit(self) -> float:
        median = statistics.median(loss for _, loss in self._usual)
        spread = _NORMAL * statistics.median([abs(loss - median) for _, loss in self._usual])
        return median + max(_DEVIATIONS * spread, _LEAST_RISE * abs(median))


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps take now.

    Attributes:
        slow: Whether they have become slow, or are as before again.
        step: The first step of them.
        times: Seconds a token, in times of what is usual.
        seconds: The median of the last steps.
    """

    slow: bool
    step: int
    times: float
    seconds: float


@dataclass(slots=True)
class SlowSteps:
    """Follows how long the steps of a training take for each token."""

    _usual: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    _last: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=_SLOW_STEPS))
    _seen: int = 0
    _slow: bool = False

    def see(self, step: int, tokens: int, seconds: float) -> Pace | None:
        """Take in a step; return the pace where it has become slow, or is as before again."""
        self._seen += 1
        if tokens <= 0 or self._seen <= _FIRST:
            return None
        self._last.append((step, seconds / tokens, seconds))
        if len(self._last) < _SLOW_STEPS:
            return None
        now = statistics.median_low(pace for _, pace, _ in self._last)
        usual = statistics.median(self._usual) if len(self._usual) >= _LEAST else 0.0
        times = now / usual if usual else 1.0
        took = statistics.median_low(taken for _, _, taken in self._last)
        if times < _SLOWER and not self._slow:
            # The oldest of the last steps: those after it may be the first slow ones.
            self._usual.append(self._last[0][1])
        if self._slow == (times > _AS_BEFORE) or (not self._slow and (times < _SLOWER or took < _LEAST_SECONDS)):
            return None
        self._slow = not self._slow
        first = next(at for at, pace, _ in self._last if (pace > _AS_BEFORE * usual) == self._slow)
        return Pace(self._slow, first, times, took)
