"""Losses that leap up and steps that become slow: what is told of them, and what is not."""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from studio.core.unusual import LossSpikes, Pace, SlowSteps, Spike


def spikes(losses: Iterable[float]) -> list[Spike]:
    watch = LossSpikes()
    return [found for step, loss in enumerate(losses, 1) if (found := watch.see(step, loss))]


def noisy(steps: int, level: float = 2.0, spread: float = 0.2) -> list[float]:
    drawn = random.Random(5)  # noqa: S311  no secret
    return [level + drawn.gauss(0, spread) for _ in range(steps)]


def test_losses_that_leap_up_and_stay_are_told_once_with_the_first_step() -> None:
    found = spikes([*noisy(100), *noisy(30, 9.0), *noisy(50)])
    assert [spike.step for spike in found] == [101]
    assert found[0].usual == pytest.approx(2.0, abs=0.15)
    assert found[0].loss == pytest.approx(9.0, abs=0.5)


def test_a_second_leap_is_told_after_the_first_is_over() -> None:
    assert [one.step for one in spikes([*noisy(60), *[9.0] * 8, *noisy(20), *[9.0] * 8])] == [61, 89]


@pytest.mark.parametrize(
    "losses",
    [
        noisy(500),
        [5.0 * math.exp(-step / 80) + 1 for step in range(400)],
        [loss if step % 40 else 12.0 for step, loss in enumerate(noisy(400))],  # steps with hard rows
        [*noisy(60), 12.0, 12.0, *noisy(60)],
        [*[0.0] * 30, *[0.0] * 30],
        [*noisy(10), *[9.0] * 40],  # too early to know what is usual
        [*noisy(60), *[math.nan] * 5],
        [1.0] * 100 + [1.2] * 100,
    ],
)
def test_what_trainings_do_anyway_is_no_leap(losses: list[float]) -> None:
    assert spikes(losses) == []


CURVES: dict[str, list[float]] = json.loads(
    (Path(__file__).parents[1] / "data" / "loss_curves.json").read_text(encoding="utf-8")
)
"""Losses of real trainings of the embedded model on the embedded data (`recipes/demo.toml` with LoRA), step by step."""


def test_real_trainings_raise_no_false_alarm() -> None:
    sound = [losses for words, losses in CURVES.items() if "comes apart" not in words]
    assert sum(map(len, sound)) > 500
    assert [spikes(losses) for losses in sound] == [[]] * len(sound)


def test_a_real_training_that_comes_apart_is_told_once_with_the_step_at_which_it_began() -> None:
    (losses,) = [losses for words, losses in CURVES.items() if "comes apart" in words]
    (found,) = spikes(losses)
    assert losses[32] < 3 < 5 < min(losses[33:48])  # it climbs from step 34 on, and leaps at step 49
    assert found.step in (34, 35)


def paces(seconds: Iterable[float], tokens: int = 1000) -> list[Pace]:
    watch = SlowSteps()
    return [found for step, taken in enumerate(seconds, 1) if (found := watch.see(step, tokens, taken))]


def test_steps_that_become_slow_are_told_and_that_it_is_over() -> None:
    slow, over = paces([*[1.0] * 60, *[3.0] * 60, *[1.0] * 60])
    assert (slow.slow, over.slow) == (True, False)
    assert slow.step == 61
    assert slow.times == pytest.approx(3.0)
    assert over.step == 121


@pytest.mark.parametrize(
    "seconds",
    [
        [60.0, 30.0, *[1.0] * 100],  # compiled in the first steps
        [9.0 if step % 10 == 0 else 1.0 for step in range(200)],  # saved and evaluated in between
        [0.01] * 50 + [0.03] * 50,  # a toy's
        [1.0] * 50 + [1.6] * 50,
    ],
)
def test_other_steps_are_not_slow(seconds: list[float]) -> None:
    assert paces(seconds) == []


def test_rows_of_other_lengths_are_not_slow_steps() -> None:
    watch = SlowSteps()
    drawn = random.Random(3)  # noqa: S311  no secret
    lengths = [drawn.randint(200, 4000) for _ in range(300)] + [4000] * 50
    assert not any(watch.see(step, tokens, tokens / 1000 + 0.1) for step, tokens in enumerate(lengths))
