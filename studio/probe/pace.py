"""How fast a recipe trains and how long it takes: from the roofline, this machine's own runs, and the data's length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from studio.core.calibration import (
    Observation,
    correct_estimate,
    correct_speed,
    matching,
    measured_speed,
    process_range,
)
from studio.core.gpu_catalogue import Gpu
from studio.core.preferences import takes_pairs
from studio.core.recipe import Recipe
from studio.core.schedule import total_steps_of
from studio.core.shape import ModelShape
from studio.core.sources import drawn_rows
from studio.core.step_work import step_work
from studio.core.throughput import Duration, Speed, duration_of, qlora_slowdown, speed_of, streaming_slowdown
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import Range, VramEstimate
from studio.core.vram.setup import Setup
from studio.probe.setting import CPU, setting_of
from studio.runs.calibration import calibration_path, read_observations

if TYPE_CHECKING:
    from studio.probe.data.sampled import RowsGuess

_UNKNOWN_CARD = "only the size of the card is known: name it with --gpu"
_LOOKED_AT = 1000
"""Sizes of rows that stand for a mixture."""
_UNKNOWN_INT8 = "no published speed of training on LLM.int8 weights was found to compare with"
_UNKNOWN_CPU = "nothing has been trained on this processor with these libraries yet: the first run will tell"


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed and time of a run.

    Attributes:
        speed: Tokens a second; None where they cannot be estimated.
        why_not: Why they cannot; empty where they can.
        slowdown: How many times as long a step takes in 4 bit as in 16: least, usual, most; None as for the speed.
        copying: How many times as long it takes with streamed layers as with none; None also where none is streamed.
        steps: Optimizer steps of the run; None without a look at the data.
        tokens: Real tokens of the run: least, usual, most.
        longest: Tokens of the longest row that was looked at; None without a look, and for texts, pairs and mixtures.
        duration: Hours of its steps.
        runs: How many runs of this setting the speed comes from.
        sources: Of a mixture each source with the rows and about the tokens that are drawn from it, a pass.
    """

    speed: Speed | None
    why_not: str = ""
    slowdown: tuple[float, float, float] | None = None
    copying: tuple[float, float, float] | None = None
    steps: int | None = None
    tokens: tuple[float, float, float] | None = None
    longest: tuple[float, float, float] | None = None
    duration: Duration | None = None
    runs: int = 0
    sources: tuple[tuple[str, int, float], ...] = ()


def pace_of(recipe: Recipe, shape: ModelShape, setup: Setup, gpu: Gpu | None, *, data_known: bool = True) -> Pace:
    """Return speed and time of a recipe on a card, or without one on this processor.

    Args:
        recipe: What is wanted; says how many steps, and where the data is.
        shape: Its base model.
        setup: How it is trained, which may be the stock loop.
        gpu: The card; None means this processor.
        data_known: Whether the recipe names its data; without it only the speed is told.

    Raises:
        BadInput: A target does not exist in this model.
    """
    if setup.quantised and setup.quant_type == "int8":
        return Pace(None, _UNKNOWN_INT8)
    seen = observations_for(gpu, setup)
    speed = _speed(shape, setup, gpu, seen)
    why_not = "" if speed else _UNKNOWN_CPU if gpu is None else _UNKNOWN_CARD
    slowdown, copying = qlora_slowdown(shape, setup, gpu), streaming_slowdown(shape, setup, gpu)
    guess = guess_of(recipe) if data_known else None
    if guess is None:
        return Pace(speed, why_not, slowdown, copying, runs=len(seen))
    steps, tokens = _run_tokens(recipe, guess)
    longest = None if guess.parts or guess.plain or setup.paired else guess.longest_row
    once = reference_share(shape, setup, guess.rows, steps * recipe.rows_per_step)
    duration = None
    if speed is not None:
        # Rows may be packed to the full length or go through as they are. Short rows make small batches, which are
        # slower: the slow end takes every row as it is.
        row = max(1, round(guess.tokens_per_row(recipe.train.seq_len, paired=setup.paired)[1]) // (1 + setup.paired))
        slowest = _speed(shape, replace(setup, seq_len=row), gpu, seen) or speed
        fast, slow = duration_of(speed, tokens[0]).low, duration_of(slowest, tokens[2]).high
        usual = duration_of(speed if recipe.train.packing == "on" else slowest, tokens[1]).expected
        usual = min(max(usual, fast), slow)
        duration = Duration(fast * (1 + once), usual * (1 + once), slow * (1 + once))
    return Pace(speed, why_not, slowdown, copying, steps, tokens, longest, duration, len(seen), guess.parts)


def calibrated(estimate: VramEstimate, setup: Setup, gpu: Gpu | None) -> VramEstimate:
    """Return an estimate corrected by this machine's own runs on the card; unchanged without any."""
    return estimate if gpu is None else correct_estimate(estimate, observations_for(gpu, setup))


def calibrated_estimate(shape: ModelShape, setup: Setup, gpu: Gpu | None) -> VramEstimate:
    """Return what a set-up of our loop needs, corrected by this machine's own runs on the card.

    Raises:
        BadInput: A target does not exist in this model.
    """
    return calibrated(estimate_vram(shape, setup, gpu), setup, gpu)


def process_of(estimate: VramEstimate, setup: Setup) -> Range | None:
    """Return what a CPU run's process will hold, tensors and the rest; None where no run here has measured the rest."""
    rest = process_range(observations_for(None, setup)) if setup.device == CPU else None
    tensors = estimate.allocated
    if rest is None:
        return None
    return Range(tensors.low + rest.low, tensors.expected + rest.expected, tensors.high + rest.high)


def observations_for(gpu: Gpu | None, setup: Setup) -> tuple[Observation, ...]:
    """Return the runs of this machine that hold for a device and a set-up; none for the stock loop."""
    if setup.engine != "studio" or (gpu is not None and not gpu.name):
        return ()
    found = _observations()
    device = gpu.name if gpu else CPU
    near = setting_of(device, setup.method, {}) if found else None
    if not any(near == replace(one.setting, versions=()) for one in found):
        return ()  # decided without the installed versions, which take 30 ms to find out
    return matching(found, setting_of(device, setup.method))


def pace_to_dict(pace: Pace) -> dict[str, Any]:
    """Return the fields that `plan --json` has for speed and time; null is "not known"."""
    names = ("low", "expected", "high")
    return {
        "tokens_per_second": asdict(pace.speed) if pace.speed else None,
        "tokens_per_second_unknown": pace.why_not or None,
        "hours": asdict(pace.duration) if pace.duration else None,
        "steps": pace.steps,
        "tokens": dict(zip(names, map(round, pace.tokens), strict=True)) if pace.tokens else None,
        "longest_row_tokens": dict(zip(names, map(round, pace.longest), strict=True)) if pace.longest else None,
        "qlora_slowdown": dict(zip(names, pace.slowdown, strict=True)) if pace.slowdown else None,
        "streaming_slowdown": dict(zip(names, pace.copying, strict=True)) if pace.copying else None,
        "calibration_runs": pace.runs,
        "sources": [{"path": path, "rows": rows, "tokens": round(tokens)} for path, rows, tokens in pace.sources],
    }


def guess_of(recipe: Recipe) -> "RowsGuess | None":
    """Return what the beginning of a recipe's data tells of its rows; None where it is not here, or cannot be read."""
    from studio.probe.data.reading import Reading  # noqa: PLC0415  as below
    from studio.probe.data.sampled import guess_rows  # noqa: PLC0415  10 ms that a plan without data does not pay

    if not recipe.data.sources:
        guess = guess_rows(recipe.data.path, Reading.of(recipe))
        in_blocks = guess and guess.plain and recipe.data.blocks
        return guess.in_blocks(recipe.train.seq_len, recipe.data.stride) if guess and in_blocks else guess
    return _mixture(recipe)


def _mixture(recipe: Recipe) -> "RowsGuess | None":
    """Return what the beginnings of a mixture's files tell, as one; None where one of them tells nothing."""
    from studio.probe.data.reading import Reading  # noqa: PLC0415  as above
    from studio.probe.data.sampled import RowsGuess, guess_rows  # noqa: PLC0415  as above

    how = Reading.of(recipe)
    found = [guess_rows(source.path, how.of_source(source)) for source in recipe.data.sources]
    known = [guess for guess in found if guess]
    if len(known) < len(found):
        return None
    sizes = [guess.tokens_per_row(2**31)[1] for guess in known] if recipe.data.weigh_by == "tokens" else None
    drawn = drawn_rows(recipe.data.sources, [guess.rows for guess in known], sizes)
    blocks = []
    for guess, rows in zip(known, drawn, strict=True):
        one = replace(guess, rows=rows)
        cut = guess.plain and recipe.data.blocks
        blocks.append(one.in_blocks(recipe.train.seq_len, recipe.data.stride) if cut else one)
    whole = sum(guess.rows for guess in blocks)
    # As many sizes of each as its share of the rows, so that the mean is that of the mixture.
    sizes_of = (
        guess.text_bytes[place * len(guess.text_bytes) // count]
        for guess in blocks
        for count in [max(1, round(_LOOKED_AT * guess.rows / whole))]
        for place in range(count)
    )
    longest = recipe.train.seq_len
    parts = (
        (source.path, rows, guess.rows * guess.tokens_per_row(longest)[1])
        for source, rows, guess in zip(recipe.data.sources, drawn, blocks, strict=True)
    )
    return RowsGuess(whole, tuple(sizes_of), parts=tuple(parts))


def _speed(shape: ModelShape, setup: Setup, gpu: Gpu | None, seen: Sequence[Observation]) -> Speed | None:
    speed = speed_of(shape, setup, gpu)
    if speed is not None:
        return correct_speed(speed, seen)
    return measured_speed(step_work(shape, setup).operations_per_token, seen)


def reference_share(shape: ModelShape, setup: Setup, rows: int, seen: int) -> float:
    """Return the time that DPO's pass over the base takes, as a share of that of all steps.

    Each pair goes forward once through what a step takes it through twice, or three times with checkpoints.

    Args:
        shape: The model.
        setup: How it is trained.
        rows: Rows that there are.
        seen: Rows that all steps see, one as often as it comes.
    """
    if setup.objective != "dpo" or not seen:
        return 0.0
    return min(1.0, rows / seen) / (2 + setup.recomputed_of(shape.layers) / shape.layers)


def _run_tokens(recipe: Recipe, guess: "RowsGuess") -> tuple[int, tuple[float, float, float]]:
    """Return the steps of a run and its tokens; all rows are taken to be as long as those at the file's beginning."""
    from studio.probe.data.split import most_held_out  # noqa: PLC0415  as above

    held_out = 0 if recipe.data.eval_path else most_held_out(guess.rows, recipe.eval.rows)
    rows = max(1, guess.rows - held_out)
    train = recipe.train
    steps = total_steps_of(steps=train.steps, epochs=train.epochs, rows=rows, rows_per_step=recipe.rows_per_step)
    seen_rows = steps * min(recipe.rows_per_step, rows)
    least, usual, most = guess.tokens_per_row(train.seq_len, paired=takes_pairs(train.objective))
    return steps, (seen_rows * least, seen_rows * usual, seen_rows * most)


def _observations() -> tuple[Observation, ...]:
    try:
        path = calibration_path()
        status = path.stat()
    except (OSError, RuntimeError, ValueError):  # no such home, a NUL in its name
        return ()
    return _read(str(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(_path: str, _changed: int, _size: int) -> tuple[Observation, ...]:
    return read_observations()
