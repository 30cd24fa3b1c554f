"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from studio.core.recipe import Schedule

Tail = Literal["constant", "restart", "rewarm"]
TAILS: dict[Tail, str] = {
    "constant": "stays where the plan before it ended",
    "restart": "begins again at the recipe's rate and falls as the recipe says",
    "rewarm": "climbs from where it ended to the recipe's rate, then falls as the recipe says",
}
"""How the learning rate goes on in steps that a run gets beyond its plan."""
_LEAST_CLIMB = 0.05
"""Share of the steps in which a rate climbs again, where the recipe has a shorter warm-up or none."""


@dataclass(frozen=True, slots=True)
class Extension:
    """Steps that a run got beyond its plan.

    Attributes:
        after: The last step of the plan before it.
        steps: How many it adds.
        tail: How the learning rate goes on in them.
    """

    after: int
    steps: int
    tail: Tail

    def __post_init__(self) -> None:
        """Refuse what is no extension.

        Raises:
            ValueError: There is no step before it or in it, or the word is unknown.
        """
        if self.after < 1 or self.steps < 1 or self.tail not in get_args(Tail):
            raise ValueError(f"no extension: {self}")

    @property
    def end(self) -> int:
        """The last step of the run with it."""
        return self.after + self.steps


def usual_tail(schedule: Schedule) -> Tail:
    """Return how the rate goes on where nobody says it: a rate that has fallen to nothing would teach nothing."""
    return "constant" if schedule == "constant" else "rewarm"


def extended_rate_at(
    step: int,
    *,
    planned_steps: int,
    extensions: Sequence[Extension],
    peak: float,
    schedule: Schedule,
    warmup_fraction: float,
) -> float:
    """Return the learning rate of a step of a run that may have got more steps than it was planned with.

    Up to the end of the plan it is what it would have been without them.

    Args:
        step: 1 to the end of the last extension.
        planned_steps: Optimizer steps of the plan.
        extensions: What was added, one after the other.
        peak: As for `learning_rate_at`, and so the rest.
        schedule: As there.
        warmup_fraction: As there.
    """
    own = next((place for place, one in enumerate(extensions) if one.after < step <= one.end), None)
    if own is None:
        return learning_rate_at(
            step, total_steps=planned_steps, peak=peak, schedule=schedule, warmup_fraction=warmup_fraction
        )
    one = extensions[own]
    ended = extended_rate_at(
        one.after,
        planned_steps=planned_steps,
        extensions=extensions[:own],
        peak=peak,
        schedule=schedule,
        warmup_fraction=warmup_fraction,
    )
    if one.tail == "constant":
        return ended
    within = step - one.after
    climb = max(warmup_fraction, _LEAST_CLIMB) if one.tail == "rewarm" else 0.0
    warmup = math.ceil(one.steps * climb)
    if within <= warmup:
        return ended + (peak - ended) * within / warmup
    return learning_rate_at(within, total_steps=one.steps, peak=peak, schedule=schedule, warmup_fraction=climb)


def learning_rate_at(step: int, *, total_steps: int, peak: float, schedule: Schedule, warmup_fraction: float) -> float:
    """Return the learning rate that optimizer step `step` (1 is the first) is taken with.

    The warm-up climbs linearly and reaches the peak at its last step, so that the first step already moves the weights.
    Cosine and linear then fall and would reach 0 one step after the last.

    Args:
        step: 1 to `total_steps`.
        total_steps: Optimizer steps of the whole run.
        peak: Highest learning rate.
        schedule: Form of the fall.
        warmup_fraction: Share of the steps spent climbing.
    """
    warmup = math.ceil(total_steps * warmup_fraction)
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    # Counted from the step after the peak, so that the first of the fall still has the full rate.
    done = (step - warmup - 1) / max(1, total_steps - warmup)
    return peak * (1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def total_steps_of(*, steps: int, epochs: float, rows: int, rows_per_step: int) -> int:
    """Return the optimizer steps of a run: `steps` where given, else what the epochs need, never less than 1.

    A step never takes more than all rows, so that few rows make as many steps as there are epochs.

    Args:
        steps: Wanted steps; 0 lets `epochs` decide.
        epochs: Passes over the rows, fractions allowed.
        rows: Training rows.
        rows_per_step: Rows of an optimizer step as the recipe asks for them.
    """
    if steps:
        return steps
    return max(1, math.ceil(epochs * rows / min(rows, rows_per_step)))
