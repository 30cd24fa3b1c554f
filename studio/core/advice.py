"""What a training on few rows should be given, and what to try after one that did not beat its base.

For models of the embedded one's size the rate was measured (`tests/bench/few_rows_results.md`). For others there are
publications: rules of thumb, of which half and twice are worth a try.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.core.evidence import LEAST_ROWS, LEAST_TOKENS, could_hide, seen_sign
from studio.core.intervals import Interval
from studio.core.preferences import ADVISED_RATES, takes_pairs
from studio.core.recipe import Recipe, number_of
from studio.core.schedule import total_steps_of

REGRET = "Schulman et al. 2025, LoRA Without Regret"
QLORA = "Dettmers et al. 2023, QLoRA"

MEASURED = "measured on the embedded model: tests/bench/few_rows_results.md"
MEASURED_FALLS: Mapping[int, Mapping[float, float]] = {9: {3e-4: 0.83, 1e-3: 1.07, 2e-3: 1.03}}
"""By steps and rate, how far the held-out loss of the embedded model fell, in nats a token (mean of the seeds).

Rank 16, alpha 32, all linear layers, 16 rows a step; 45 rows read three times. The figures' lines, with intervals, are
in `tests/bench/few_rows.jsonl`; a test holds this table to them.
"""
_MEASURED_PARAMETERS = 134_515_008
_ALIKE_PARAMETERS = 1.5
_AS_GOOD = 0.9
"""Rates that reach this share of the best fall count as good."""

_LARGE_PARAMETERS = 30e9
_SHORT_RUN_STEPS = 100
_FEW_STEPS = 30
_LEAST_ROWS_PER_STEP = 4
_AWAY = 1.25
"""A rate within this factor of another one is the same advice."""
_BY_HEART = 0.5
"""From this share of its first training loss on, a run whose held-out loss stood still has learnt its rows by heart."""
_MOST_TRIES = 3
_MOST_SHARE = 4
"""One row in so many is held out at most: `studio.probe.data.split.most_held_out`."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A learning rate, the range that was found good, the reason, and where that comes from."""

    value: float
    least: float
    most: float
    why: str
    source: str

    @property
    def shown(self) -> str:
        """The rate as people write it."""
        return rate_in_words(self.value)


def rate_in_words(rate: float) -> str:
    """Return a learning rate as people write it: 2e-4, 2.9e-4."""
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def advised_rate(parameters: int, hidden: int, steps: int) -> Rate:
    """Return the rate for supervised training with LoRA or QLoRA.

    Args:
        parameters: Of the whole model.
        hidden: Its width.
        steps: Optimizer steps of the run.
    """
    like_measured = 1 / _ALIKE_PARAMETERS <= parameters / _MEASURED_PARAMETERS <= _ALIKE_PARAMETERS
    if like_measured and steps < _SHORT_RUN_STEPS:
        return _measured_rate(steps)
    # Schulman et al. fitted the best rates of 14 Llama and Qwen models by their width: the powers are those of both.
    fits = [5e-4 * (2000 / hidden) ** power for power in (0.781, 0.0775)]
    if parameters >= _LARGE_PARAMETERS:
        value, why = 1e-4, "half the usual 2e-4 for models of 30 B and more"
    elif steps < _SHORT_RUN_STEPS:
        value, why = 3e-4, f"a short run ({steps} steps) bears 1.5 times the usual 2e-4"
    else:
        value, why = 2e-4, "ten times what full fine-tuning takes; the rank hardly matters for it"
    least, most = min(1e-4 if value <= 1e-4 else 2e-4, *fits), max(value, *fits)
    why += f"; published for this width: {rate_in_words(least)} to {rate_in_words(most)}"
    return Rate(value, least, most, why, f"{REGRET}; {QLORA}")


def _measured_rate(steps: int) -> Rate:
    """Return the rate that lowered the held-out loss most, at the number of steps nearest to these."""
    nearest = min(MEASURED_FALLS, key=lambda known: abs(math.log(max(1, steps) / known)))
    falls = MEASURED_FALLS[nearest]
    good = [rate for rate, fall in falls.items() if fall >= _AS_GOOD * max(falls.values())]
    best = max(falls, key=falls.__getitem__)
    told = ", ".join(f"by {fall:.2f} at {rate_in_words(rate)}" for rate, fall in sorted(falls.items()))
    why = f"{nearest} steps lowered the held-out loss of a model of this size {told} (nats a token)"
    return Rate(best, min(good), max(good), why, MEASURED)


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a training run told of itself.

    Attributes:
        steps: Optimizer steps done.
        planned: Optimizer steps that it was to take.
        rows: Rows that it learnt from.
        held_out_rows: Rows that it was measured on.
        gain: Held-out loss at the end minus that before the first step; None where it is not known.
        held_out: Steps and held-out losses, in order.
        training: The first and the last training loss; None where they are not known.
        model: Parameters and width of the base; None where they are not known.
    """

    steps: int
    planned: int
    rows: int
    held_out_rows: int
    gain: Interval | None
    held_out: Sequence[tuple[int, float]]
    training: tuple[float, float] | None
    model: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Try:
    """Something to change in the next run, in words, and as fields of the recipe where fields can say it."""

    words: str
    settings: tuple[tuple[str, Any], ...] = ()

    def told(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return {"words": self.words, "settings": dict(self.settings)}


def next_tries(recipe: Recipe, learnt: Learnt, improved: bool | None) -> tuple[Try, ...]:
    """Return what to try next, the most promising first; nothing for a run that beat its base.

    Args:
        recipe: What the run was asked to do.
        learnt: What came of it.
        improved: Whether its held-out loss fell beyond noise; None where that cannot be told.
    """
    if improved:
        return ()
    if learnt.steps < learnt.planned:
        return (Try("let it run to its end, where the held-out loss is measured again: lora-studio runs resume RUN"),)
    if improved is None:
        return (_judged(recipe, learnt),)
    tries: list[Try] = []
    if learnt.gain is not None and seen_sign(learnt.gain) > 0:
        tries += _after_harm(recipe, learnt)
    else:
        tries += _after_nothing(recipe, learnt)
    return tuple(tries[:_MOST_TRIES])


def _judged(recipe: Recipe, learnt: Learnt) -> Try:
    """Return what lets the next run's end be judged."""
    wanted = f"{LEAST_ROWS} rows with {LEAST_TOKENS} learnt tokens in all"
    if recipe.data.eval_path:
        return Try(f"give it more held-out rows (data.eval_path): {wanted} are the least that can be judged")
    rows = learnt.rows + learnt.held_out_rows
    # Where there were enough rows, they had too few tokens.
    enough = LEAST_ROWS if learnt.held_out_rows < LEAST_ROWS else 2 * learnt.held_out_rows
    if enough > rows / _MOST_SHARE:
        return Try(f"find more rows: {wanted} must be held out to judge a run, and there are {rows} in all")
    words = f"hold out {enough} of the {rows} rows: {wanted} are the least that can be judged"
    return Try(words, (("eval.rows", enough),))


def _after_harm(recipe: Recipe, learnt: Learnt) -> Iterator[Try]:
    """Yield what to try after the held-out loss has risen."""
    if (best := _best_before_the_end(learnt)) is not None:
        step, loss = best
        yield Try(f"stop at step {step}: there the held-out loss was lowest ({loss:.3f})", (("train.steps", step),))
        return
    rate, advised = recipe.train.learning_rate, _advised(recipe, learnt)
    if advised is not None and rate > _AWAY * advised.most:
        yield _at_rate(recipe, advised.value, advised.why)
    else:
        yield _at_rate(recipe, rate / 2, "half of it harms less")
    if not recipe.train.steps and recipe.train.epochs > 1:
        epochs = max(1.0, recipe.train.epochs // 2)
        yield Try(f"read the rows {epochs:g} times, not {recipe.train.epochs:g}", (("train.epochs", epochs),))
    yield Try("look whether the held-out rows ask for what the others teach: lora-studio data show")


def _after_nothing(recipe: Recipe, learnt: Learnt) -> Iterator[Try]:
    """Yield what to try after a held-out loss that did not move beyond noise."""
    if (best := _best_before_the_end(learnt)) is not None:
        step, loss = best
        yield Try(f"stop at step {step}: there the held-out loss was lowest ({loss:.3f})", (("train.steps", step),))
        return
    rate, advised = recipe.train.learning_rate, _advised(recipe, learnt)
    by_heart = learnt.training is not None and learnt.training[1] < _BY_HEART * learnt.training[0]
    if by_heart and learnt.training is not None:
        first, last = learnt.training
        yield Try(
            f"find more rows: the training loss fell from {first:.2f} to {last:.2f} and the held-out loss did not, so "
            f"the {learnt.rows} rows were learnt by heart"
        )
    elif advised is not None and not advised.value / _AWAY <= rate <= advised.most * _AWAY:
        yield _at_rate(recipe, advised.value, advised.why)
    elif not takes_pairs(recipe.train.objective):
        yield _at_rate(recipe, 2 * rate, "twice a rate that taught nothing is the usual next try")
    if not by_heart and learnt.steps < _FEW_STEPS:
        yield _more_steps(recipe, learnt)
    if learnt.gain is not None and (hides := could_hide(learnt.gain)):
        yield Try(f"hold out more than {learnt.held_out_rows} rows: {hides} in so few")
    if by_heart and not recipe.train.steps and recipe.train.epochs > 1:
        epochs = max(1.0, recipe.train.epochs // 2)
        yield Try(f"read the rows {epochs:g} times, not {recipe.train.epochs:g}", (("train.epochs", epochs),))


def _best_before_the_end(learnt: Learnt) -> tuple[int, float] | None:
    """Return step and held-out loss of an evaluation that was better than the first and the last; None without one."""
    between = [(loss, step) for step, loss in learnt.held_out[1:-1] if step and math.isfinite(loss)]
    if not between or min(between)[0] >= min(learnt.held_out[0][1], learnt.held_out[-1][1]):
        return None
    loss, step = min(between)
    return step, loss


def _advised(recipe: Recipe, learnt: Learnt) -> Rate | None:
    if takes_pairs(recipe.train.objective):
        rate, source = ADVISED_RATES[recipe.train.objective]
        return Rate(rate, rate / 2, 2 * rate, f"the rate of {source}", source)
    return None if learnt.model is None else advised_rate(*learnt.model, learnt.steps)


def _at_rate(recipe: Recipe, rate: float, why: str) -> Try:
    limits = number_of("train.learning_rate")
    rate = float(rate_in_words(min(max(rate, limits.low), limits.high)))
    before = recipe.train.learning_rate
    verb = "raise" if rate > before else "lower"
    words = f"{verb} the learning rate from {rate_in_words(before)} to {rate_in_words(rate)}: {why}"
    return Try(words, (("train.learning_rate", rate),))


def _more_steps(recipe: Recipe, learnt: Learnt) -> Try:
    train = recipe.train
    if train.steps:
        return Try(f"take {2 * train.steps} steps, not {train.steps}", (("train.steps", 2 * train.steps),))
    if recipe.rows_per_step > _LEAST_ROWS_PER_STEP:
        micro_batch = min(train.micro_batch, _LEAST_ROWS_PER_STEP)
        settings = (("train.micro_batch", micro_batch), ("train.accumulation", _LEAST_ROWS_PER_STEP // micro_batch))
        steps = total_steps_of(steps=0, epochs=train.epochs, rows=learnt.rows, rows_per_step=_LEAST_ROWS_PER_STEP)
        words = f"take {_LEAST_ROWS_PER_STEP} rows a step, not {recipe.rows_per_step}"
        return Try(f"{words}: {steps} steps of the same rows instead of {learnt.steps}", settings)
    epochs = 2 * train.epochs
    return Try(f"read the rows {epochs:g} times, not {train.epochs:g}", (("train.epochs", epochs),))
