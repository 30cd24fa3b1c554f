"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math

from studio.core.recipe import Schedule


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
